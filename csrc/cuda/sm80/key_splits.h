// Into how many parts the keys of a decoding call are split (Dao et al. 2023, "Flash-Decoding"), and the memory that
// the parts' results take. Plain C++, for tier.cpp and decode.cuh.
#pragma once

#include "../kernels.h"

namespace torch_attn::cuda::sm80 {

constexpr int kDecodeRows = 16;  // query rows of a block, taken from all query heads that read its key/value head
constexpr int64_t kMaxPackedRows = 64;
constexpr int64_t kMinKeysToSplit = 256, kMinKeysOfSplit = 128;
constexpr int kMaxSplits = 64;

TA_HOST_DEVICE int64_t packed_rows(const AttentionProblem& p) { return p.group_size() * p.query_length; }

// How many keys a block of rows can attend at most; key_lengths may lie in the device's memory.
inline int64_t keys_in_reach(const AttentionProblem& p) {
  const int64_t reach = p.window_left + p.window_right + p.query_length;
  return reach < p.key_length ? reach : p.key_length;
}

// 0: decode.cuh is not the kernel to use. A block of forward.cuh holds 64 rows or more of one head: with few rows most
// of it is idle, each head of a group reads the keys again, and a long cache is read by few multiprocessors.
// slots: how many blocks run at once. The number is the smallest whose last wave is nearly as full as any's, the
// criterion of FlashAttention's num_splits_heuristic. It depends on sizes alone, so results are the same in every run.
inline int key_splits(const AttentionProblem& p, int64_t slots) {
  constexpr double kGoodEnough = 0.85;
  const int64_t rows = packed_rows(p), keys = keys_in_reach(p);
  if (rows > kMaxPackedRows || keys < kMinKeysToSplit) return 0;
  if (rows > kDecodeRows && p.batch * p.heads >= slots) return 0;
  const int64_t blocks = p.batch * p.kv_heads * ((rows + kDecodeRows - 1) / kDecodeRows);
  if (blocks == 0) return 0;
  const int64_t most = keys / kMinKeysOfSplit < kMaxSplits ? keys / kMinKeysOfSplit : kMaxSplits;
  const auto fullness = [&](int64_t splits) {
    const int64_t waves = (blocks * splits + slots - 1) / slots;
    return static_cast<double>(blocks * splits) / static_cast<double>(waves * slots);
  };
  double best = 0;
  for (int64_t splits = 1; splits <= most; ++splits) best = fullness(splits) > best ? fullness(splits) : best;
  int64_t splits = 1;
  while (fullness(splits) < kGoodEnough * best) ++splits;
  return static_cast<int>(splits);
}

// What the blocks of one split know of a query row: the running maximum of its scores, the sum of exp(score − maximum),
// and the values weighted by these. A split in which a row attends no key has sum 0, and its `out` is not written.
struct Partials {
  int splits;
  int64_t rows;  // B · Hq · L
  int value_dim;
  float *maximum, *sum;  // (splits, rows)
  float* out;            // (splits, rows, value_dim)

  Partials(const AttentionProblem& p, int split_count, void* workspace)
      : splits(split_count),
        rows(p.batch * p.heads * p.query_length),
        value_dim(static_cast<int>(p.value_dim)),
        maximum(static_cast<float*>(workspace)),
        sum(maximum + padded(splits * rows)),
        out(sum + padded(splits * rows)) {}

  static size_t bytes(const AttentionProblem& p, int split_count) {
    const int64_t rows = split_count * p.batch * p.heads * p.query_length;
    return static_cast<size_t>(2 * padded(rows) + rows * p.value_dim) * sizeof(float);
  }

 private:
  static int64_t padded(int64_t count) { return (count + 3) / 4 * 4; }  // whole pieces of 16 bytes
};

}  // namespace torch_attn::cuda::sm80
