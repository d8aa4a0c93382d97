// See scratch.h.
#include "scratch.h"

#include <cstdlib>
#include <new>

namespace torch_attn::cpu {

struct Scratch::Block {
  Block* older;
  size_t size;
  size_t used;
};

namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHeader = kAlignment;  // room for a Block, keeping what follows aligned
constexpr size_t kSmallestBlock = size_t{1} << 18;
constexpr size_t kLargestKept = size_t{1} << 24;  // larger blocks go back to the system when their task ends
constexpr size_t kPage = 4096;

// The block that a thread keeps. It is taken out while in use, so that a nested Scratch just allocates its own.
struct Kept {
  void* block = nullptr;
  ~Kept() { std::free(block); }
};
thread_local Kept kept;

}  // namespace

Scratch::Scratch() {
  newest_ = static_cast<Block*>(kept.block);
  kept.block = nullptr;
  if (newest_ != nullptr) newest_->used = kHeader;
}

Scratch::~Scratch() {
  // Several blocks mean the kept one was too small: the next task allocates one of the size that this one took.
  const bool keep =
      newest_ != nullptr && newest_->older == nullptr && newest_->size <= kLargestKept && kept.block == nullptr;
  if (keep) {
    kept.block = newest_;
    return;
  }
  while (newest_ != nullptr) {
    Block* older = newest_->older;
    std::free(newest_);
    newest_ = older;
  }
  if (kept.block == nullptr && total_ + kHeader <= kLargestKept) {
    const size_t size = (total_ + kHeader + kPage - 1) / kPage * kPage;
    void* memory = std::aligned_alloc(kAlignment, size);
    if (memory != nullptr) kept.block = new (memory) Block{nullptr, size, kHeader};
  }
}

void* Scratch::take_bytes(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  total_ += bytes;
  if (newest_ == nullptr || newest_->size - newest_->used < bytes) {
    size_t size = bytes + kHeader < kSmallestBlock ? kSmallestBlock : bytes + kHeader;
    size = (size + kPage - 1) / kPage * kPage;
    void* memory = std::aligned_alloc(kAlignment, size);
    if (memory == nullptr) throw std::bad_alloc();
    newest_ = new (memory) Block{newest_, size, kHeader};
  }
  void* result = reinterpret_cast<char*>(newest_) + newest_->used;
  newest_->used += bytes;
  return result;
}

}  // namespace torch_attn::cpu
