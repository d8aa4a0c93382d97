// What kernels.h is for the kernels of attention maps. Included by instantiate/map_amx.cpp and
// instantiate/map_avx512_bf16.cpp.
#pragma once

#include "joint_weights.h"
#include "softmax_weights.h"

namespace torch_attn::cpu::TORCH_ATTN_ISA {

// With fewer, a panel's lanes or a tile's keys would be mostly empty.
constexpr int64_t kFewestMapRows = 16, kFewestMapKeys = 32;

#if defined(__AMX_BF16__)
// False where they are left to vectors.
template <class Stored>
static bool weights_in_pieces(const AttentionProblem& p, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  if (!gains_by_pieces<Stored>(p)) return false;
  if (outputs.out.defined()) return joint_weights<Stored>(p, outputs, parallel);
  return weights_with<AmxPanel<Stored>>(p, outputs, parallel);
}
#endif

static void map_weights(const AttentionProblem& p, const SoftmaxOutputs& outputs, const Parallel& parallel) {
  const bool suits = p.batch * p.kv_heads > 0 && p.query_length >= kFewestMapRows && p.key_length >= kFewestMapKeys;
  const bool known = outputs.logsumexp != nullptr;
  if (suits && p.dtype == ScalarType::kBFloat16 && !known) return softmax_weights(p, outputs, parallel);
  if (suits && p.dtype == ScalarType::kBFloat16 && weights_with<AmxPanel<BFloat16>>(p, outputs, parallel)) return;
#if defined(__AMX_BF16__)
  if (suits && p.dtype == ScalarType::kFloat16 && weights_in_pieces<Float16>(p, outputs, parallel)) return;
  if (suits && p.dtype == ScalarType::kFloat32 && weights_in_pieces<float>(p, outputs, parallel)) return;
#endif
  kAvx512MapKernels.weights(p, outputs, parallel);
}

static void map_statistics(const AttentionProblem& p, const StatisticsOutputs& outputs, const Parallel& parallel) {
  kAvx512MapKernels.statistics(p, outputs, parallel);
}

static void map_backward(const AttentionProblem& p, const MapBackwardTensors& tensors, const Parallel& parallel) {
  kAvx512MapKernels.backward(p, tensors, parallel);
}

}  // namespace torch_attn::cpu::TORCH_ATTN_ISA
