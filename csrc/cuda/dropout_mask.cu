// The dropout bits written out, for the op that the composite path and the tests use.
#include "head_score.cuh"
#include "launch.h"

namespace torch_attn::cuda {
namespace {

constexpr int kThreads = 256, kKeys = Dropout::kKeysPerCall;

// A thread writes the eight keys of one row that share a Philox call.
__global__ void __launch_bounds__(kThreads) dropout_mask_kernel(const __grid_constant__ AttentionProblem p, bool* out) {
  const int64_t groups = ceil_div(p.key_length, kKeys);
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t row_index = index / groups, key = index % groups * kKeys;
  if (row_index >= p.batch * p.heads * p.query_length) return;
  const int64_t head = row_index / p.query_length, row = row_index % p.query_length;  // head: of B · Hq
  const uint32_t kept =
      kept_of_call(make_dropout(p), dropout_batch_head(p, head / p.heads, head % p.heads), row, key) >> row % 2;
  for (int i = 0; i < kKeys && key + i < p.key_length; ++i) {
    out[row_index * p.key_length + key + i] = kept >> (i % 2 * 16 + i % 4 / 2 * 8 + i / 4 * 2) & 1;
  }
}

}  // namespace

void dropout_keep_mask(const AttentionProblem& p, bool* out, const Stream& stream) {
  const int64_t groups = (p.key_length + kKeys - 1) / kKeys;
  const int64_t calls = p.batch * p.heads * p.query_length * groups;
  launch(dropout_mask_kernel, (calls + kThreads - 1) / kThreads, kThreads, 0, stream, p, out);
}

}  // namespace torch_attn::cuda
