// What kernels.h is for the kernels of attention maps. Included by instantiate/map_amx.cpp and
// instantiate/map_avx512_bf16.cpp.
#pragma once

#include "softmax_weights.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// With fewer, a panel's lanes or a tile's keys would be mostly empty.
constexpr int64_t kFewestMapRows = 16, kFewestMapKeys = 32;

// False where it does not serve a call.
template <class Stored>
static bool map_weights_of(const AttentionProblem& p, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  if (p.batch * p.kv_heads == 0 || p.query_length < kFewestMapRows || p.key_length < kFewestMapKeys) return false;
  if (!gains_by_pieces<Stored>(p)) return false;
  return outputs.logsumexp == nullptr ? softmax_weights<Stored>(p, outputs, parallel)
                                      : weights_with<AmxPanel<Stored>>(p, outputs, parallel);
}

static void map_weights(const AttentionProblem& p, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  bool done = false;
  if (p.dtype == ScalarType::kBFloat16) done = map_weights_of<BFloat16>(p, outputs, parallel);
#if defined(__AMX_BF16__)
  if (p.dtype == ScalarType::kFloat16) done = map_weights_of<Float16>(p, outputs, parallel);
  if (p.dtype == ScalarType::kFloat32) done = map_weights_of<float>(p, outputs, parallel);
#endif
  if (!done) kAvx512MapKernels.weights(p, outputs, parallel);
}

static void map_statistics(const AttentionProblem& p, const StatisticsOutputs& outputs, const Parallel& parallel) {
  kAvx512MapKernels.statistics(p, outputs, parallel);
}

static void map_backward(const AttentionProblem& p, const MapBackwardTensors& tensors, const Parallel& parallel) {
  kAvx512MapKernels.backward(p, tensors, parallel);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
