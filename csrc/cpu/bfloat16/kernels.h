// What runs by products of bfloat16 at the instruction sets that have them, and what is left to the AVX-512 kernels.
// Included by instantiate/amx.cpp and instantiate/avx512_bf16.cpp.
#pragma once

#include "decode_pairs.h"
#if defined(__AMX_BF16__)
#include "decode_pieces.h"
#include "decode_tiles.h"
#endif
#include "forward.h"
#include "walk.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// With fewer rows a panel's lanes would be mostly empty, and with fewer keys backward's tiles: what AMX gains makes up
// for that, what `vdpbf16ps` can gain does not (16 rows and keys: 1.7 times slower than converting to float32).
#if defined(__AMX_BF16__)
constexpr int64_t kFewestRows = 16, kFewestBackwardKeys = 1;
#else
constexpr int64_t kFewestRows = 17, kFewestBackwardKeys = 24;
#endif

// Forward takes fewer keys to be done before operands are packed.
constexpr int64_t kFewestKeys = 32;

// Whether this folder's kernels take a call, of so many rows and keys at least.
static bool suits(const AttentionProblem& p, int64_t fewest_rows, int64_t fewest_keys) {
  return p.query_length >= fewest_rows && p.key_length >= fewest_keys && p.batch * p.kv_heads > 0;
}

template <class Stored>
static void forward_of(const AttentionProblem& p, const ForwardOutputs& outputs, const Parallel& parallel) {
  if (!suits(p, kFewestRows, kFewestKeys) || !gains_by_pieces<Stored>(p))
    return kAvx512Kernels.forward(p, outputs, parallel);
  bool infinite = false;
  const AttendedBits attended(p, parallel);
  const AmxForward<Stored> kernel(p, outputs, attended, parallel.threads, &infinite);
  for_each_item(parallel, kernel.items(), [&](int64_t item, Scratch& scratch) { kernel.run(item, scratch); });
  if (infinite) kAvx512Kernels.forward(p, outputs, parallel);
}

static void forward(const AttentionProblem& p, const ForwardOutputs& outputs, const Parallel& parallel) {
  switch (p.dtype) {
    case ScalarType::kBFloat16:
      if (suits(p, 1, kFewestKeys)) {
#if defined(__AMX_BF16__)
        if (DecodeTiles::suits(p.query_length, p.group_size())) {
          decode_with<DecodeTiles>(p, outputs, parallel);
          return;
        }
#endif
        if (DecodePairs::suits(p.query_length)) {
          decode_with<DecodePairs>(p, outputs, parallel);
          return;
        }
      }
      return forward_of<BFloat16>(p, outputs, parallel);
#if defined(__AMX_BF16__)
    case ScalarType::kFloat16:
      if (suits(p, 1, kFewestKeys) && DecodePieces<kTileSide>::suits(p)) {
        const bool few = p.query_length * p.group_size() <= kTileSide / 2;
        const bool stands = few ? decode_with<DecodePieces<kTileSide / 2>>(p, outputs, parallel)
                                : decode_with<DecodePieces<kTileSide>>(p, outputs, parallel);
        if (!stands) kAvx512Kernels.forward(p, outputs, parallel);
        return;
      }
      return forward_of<Float16>(p, outputs, parallel);
    case ScalarType::kFloat32:
      return forward_of<float>(p, outputs, parallel);
#endif
    default:
      return kAvx512Kernels.forward(p, outputs, parallel);
  }
}

// Rows whose weights must be normalised once more are left to the kernels that do so.
static bool has_large_logsumexp(const AttentionProblem& p, const BackwardTensors& t) {
  const float* logsumexp = static_cast<const float*>(t.logsumexp);
  bool any = false;
  for (int64_t head = 0; head < p.batch * p.heads; ++head) {
    const float* row = logsumexp + p.first_row(head / p.heads, head % p.heads);
    for (int64_t i = 0; i < p.query_length; ++i) any |= is_large_logsumexp(row[i]);
  }
  return any;
}

template <class Stored>
static void backward_of(const AttentionProblem& p, const BackwardTensors& t, const Parallel& parallel) {
  if (!suits(p, kFewestRows, kFewestBackwardKeys) || !gains_by_pieces<Stored>(p) || has_large_logsumexp(p, t))
    return kAvx512Kernels.backward(p, t, parallel);
  if (t.grad_attn_mask.defined()) mask_gradient<BackwardScores<GradientTile<float>>>(p, t, parallel);
  const AttendedBits attended(p, parallel);
  if (!backward_with<AmxWalk<Stored>>(p, t, parallel, &attended)) kAvx512Kernels.backward(p, t, parallel);
}

static void backward(const AttentionProblem& p, const BackwardTensors& t, const Parallel& parallel) {
  switch (p.dtype) {
    case ScalarType::kBFloat16:
      return backward_of<BFloat16>(p, t, parallel);
#if defined(__AMX_BF16__)
    case ScalarType::kFloat16:
      return backward_of<Float16>(p, t, parallel);
    case ScalarType::kFloat32:
      return backward_of<float>(p, t, parallel);
#endif
    default:
      return kAvx512Kernels.backward(p, t, parallel);
  }
}

static void tangent_forward(const AttentionProblem& p, const Tangents& tangents, const TangentForwardOutputs& outputs,
                            const Parallel& parallel) {
  kAvx512Kernels.tangent_forward(p, tangents, outputs, parallel);
}

static void tangent_backward(const AttentionProblem& p, const Tangents& tangents, const TangentBackwardTensors& t,
                             const Parallel& parallel) {
  kAvx512Kernels.tangent_backward(p, tangents, t, parallel);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
