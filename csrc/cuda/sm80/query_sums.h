// The memory in which all_gradients.cuh adds up grad_query, and when that kernel is the one to use. Plain C++, for
// tier.cpp, too.
#pragma once

#include "../kernels.h"

namespace torch_attn::cuda::sm80 {

// float32, for each 16 rows of a head and each 8 columns 128 sums, in the order of a warp's accumulators
// (query_sums.cuh).
struct QuerySums {
  static constexpr int kRows = 64;  // the rows of a head and batch entry are padded to a multiple of it

  TA_HOST_DEVICE static int64_t tiles(const AttentionProblem& p) { return (p.query_length + kRows - 1) / kRows; }

  // Of a packed sequence, where the tiles start is known from where its rows do: those before it take no more than
  // this.
  TA_HOST_DEVICE static int first_tile(const AttentionProblem& p, int batch, int head) {
    if (p.query_starts == nullptr) return (batch * static_cast<int>(p.heads) + head) * static_cast<int>(tiles(p));
    const int before = static_cast<int>(p.query_starts[batch]) / kRows + batch;
    return head * static_cast<int>(packed_tiles(p)) + before;
  }
  static size_t bytes(const AttentionProblem& p, int dim) {
    const int64_t all_tiles = p.heads * (p.query_starts == nullptr ? p.batch * tiles(p) : packed_tiles(p));
    return static_cast<size_t>(all_tiles * kRows * dim) * sizeof(float);
  }

 private:
  TA_HOST_DEVICE static int64_t packed_tiles(const AttentionProblem& p) { return p.packed_rows / kRows + p.batch; }
};

constexpr int kFusedKeys = 128;  // keys of a block

// In matrix products of rows x keys x dim, each divided by the share of the multiprocessors that its blocks reach, one
// kernel takes 5; query_gradient 3 and key_value_gradient 4, since both compute scores and their gradients again.
// Atomics are not counted: a float32 sum for every query row, column and block of keys.
inline bool is_fused_faster(const AttentionProblem& p, int multiprocessors) {
  const auto share = [multiprocessors](int64_t heads, int64_t length, int64_t of_block) {
    const double blocks = static_cast<double>(heads * ((length + of_block - 1) / of_block));
    return blocks < multiprocessors ? blocks / multiprocessors : 1.0;
  };
  const int64_t kv_heads = p.batch * p.kv_heads;
  if (kv_heads * p.key_length * p.query_length == 0) return false;
  const double one = 5 / share(kv_heads, p.key_length, kFusedKeys);
  const double two = 3 / share(p.batch * p.heads, p.query_length, 64) + 4 / share(kv_heads, p.key_length, 64);
  return one <= two;
}

}  // namespace torch_attn::cuda::sm80
