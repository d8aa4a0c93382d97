// Where an element lies is from the PTX ISA, "Shared Memory Matrix Layout", for the 128-byte swizzle; which thread
// holds which element of registers, from "Register Fragments for wgmma.mma_async.m64nNk16".
#include "warpgroup.h"

#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "memory.h"
#include "scheduler.h"

namespace emulation {
namespace {

struct Product {
  Half type;
  float (*d)[4];
  int groups;
  const uint32_t* registers;  // of a, or null: `a` is in shared memory
  std::optional<SharedMatrix> a;
  bool a_is_transposed;
  SharedMatrix b;
  bool b_is_transposed;
  bool add;
};
struct Queue {
  std::deque<std::vector<Product>> groups;
  std::vector<Product> open;
};
std::vector<Queue> queues;

uint32_t element(const char* linear) {
  const auto address = reinterpret_cast<uintptr_t>(linear);
  const char* place = reinterpret_cast<const char*>(address ^ (address >> 7 & 7) << 4);
  check_read(place, 2, "wgmma");
  uint16_t bits;
  std::memcpy(&bits, place, 2);
  return bits;
}
// Elements (row, k) and (row, k + 1); of b a row is one of its columns.
uint32_t pair_of(const SharedMatrix& m, bool is_transposed, int row, int k) {
  if (!is_transposed) {
    const char* const line = m.start + row / 8 * m.group_bytes + row % 8 * 128 + 2 * k;
    return element(line) | element(line + 2) << 16;
  }
  const char* const column = m.start + row / 64 * m.column_bytes + row % 64 * 2;
  const auto line = [&](int i) { return column + i / 8 * m.group_bytes + i % 8 * 128; };
  return element(line(k)) | element(line(k + 1)) << 16;
}

void check(const SharedMatrix& m) {
  if (!is_shared(m.start)) fail("wgmma: an operand's address is not in shared memory");
  if (reinterpret_cast<uintptr_t>(m.start) % 16) fail("wgmma: an operand's address is not a multiple of 16");
}

int first_row() { return current->warp % 4 * 16 + current->lane / 4; }
int first_pair() { return 2 * (current->lane % 4); }

// From now on the operands in shared memory may be read. What four warps read, one checks.
void check_operands(const Product& p) {
  const int row = first_row(), pair = first_pair();
  for (int i = 0; i < 4 && !p.registers; ++i) pair_of(*p.a, p.a_is_transposed, row + i % 2 * 8, pair + i / 2 * 8);
  for (int g = 0; g < p.groups && current->warp % 4 == 0; ++g)
    for (int k : {pair, pair + 8}) pair_of(p.b, p.b_is_transposed, 8 * g + current->lane / 4, k);
}

void compute(const Product& p) {
  const int group = current->lane / 4, pair = first_pair(), row = first_row();
  uint32_t a[4];
  for (int i = 0; i < 4; ++i)
    a[i] = p.registers ? p.registers[i] : pair_of(*p.a, p.a_is_transposed, row + i % 2 * 8, pair + i / 2 * 8);
  for (int g = 0; g < p.groups; ++g) {
    if (!p.add) std::memset(p.d[g], 0, sizeof(p.d[g]));
    const auto of_b = [&](int k) { return pair_of(p.b, p.b_is_transposed, 8 * g + group, k); };
    float sum[4];
    std::memcpy(sum, p.d[g], sizeof(sum));
    multiply_accumulate_16x8x16(p.type, sum, a, of_b(pair), of_b(pair + 8));
    std::memcpy(p.d[g], sum, sizeof(sum));
  }
}

}  // namespace

void reset_products(int threads) { queues.assign(threads, Queue{}); }

void issue_product(Half type, float (*d)[4], int groups, const SharedMatrix& a, bool a_is_transposed,
                   const SharedMatrix& b, bool b_is_transposed, bool add) {
  check(a);
  check(b);
  queues[current->index].open.push_back({type, d, groups, nullptr, a, a_is_transposed, b, b_is_transposed, add});
  check_operands(queues[current->index].open.back());
}
void issue_product(Half type, float (*d)[4], int groups, const uint32_t (&a)[4], const SharedMatrix& b) {
  check(b);
  queues[current->index].open.push_back({type, d, groups, a, std::nullopt, false, b, true, true});
  check_operands(queues[current->index].open.back());
}
void commit_products() {
  Queue& queue = queues[current->index];
  queue.groups.push_back(std::move(queue.open));
  queue.open.clear();
}
void wait_for_products(int groups_left) {
  if (fault_here(Fault::kSkipProductWait)) return;
  Queue& queue = queues[current->index];
  while (static_cast<int>(queue.groups.size()) > groups_left) {
    const std::vector<Product> group = std::move(queue.groups.front());
    queue.groups.pop_front();
    for (const Product& product : group) compute(product);
  }
}

}  // namespace emulation
