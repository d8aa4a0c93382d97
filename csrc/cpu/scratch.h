// A task's working memory: included by the kernels. Memory comes from blocks that the thread keeps between calls (up to
// a bound), so that inner loops never allocate and short calls do not pay for page faults.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torch_attn::cpu {

class Scratch {
 public:
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Uninitialised, 64-byte aligned, valid until this object ends.
  template <class T>
  __attribute__((always_inline)) T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* take_bytes(size_t bytes);

  struct Block;
  Block* newest_ = nullptr;
  size_t total_ = 0;
};

}  // namespace torch_attn::cpu
