// The CUDA attention kernels' whole interface; included by csrc/ops and by dispatch.cpp. No Torch and no CUDA type
// appears here. Errors are exceptions.
//
// Every tensor is described in core/problem.h and lies in the memory of the stream's device; so do key_lengths and
// rng_state. Outputs need no initialisation. Results are the same in every run, save for gradients of which
// BackwardTensors::deterministic is false.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../core/problem.h"
#include "device_info.h"

namespace torch_attn::cuda {

// Where the kernels run. handle is a cudaStream_t.
struct Stream {
  int device = 0;
  void* handle = nullptr;
};

// Scratch memory is 16-byte aligned and of the size that the function before names, which may be 0.
size_t forward_workspace_bytes(const AttentionProblem& problem, const Stream& stream);
void attention_forward(const AttentionProblem& problem, const ForwardOutputs& outputs, void* workspace,
                       const Stream& stream);
size_t backward_workspace_bytes(const AttentionProblem& problem, const BackwardTensors& tensors, const Stream& stream);
void attention_backward(const AttentionProblem& problem, const BackwardTensors& tensors, void* workspace,
                        const Stream& stream);

// The dropout bits themselves, true where a weight is kept: out is (B, Hq, L, S), contiguous.
void dropout_keep_mask(const AttentionProblem& problem, bool* out, const Stream& stream);

void set_zero(void* memory, size_t bytes, const Stream& stream);

// Kernels come in tiers, tried in this order. A tier that cannot serve a call says why, one that can says how.
struct TierAnswer {
  const char* tier;
  std::string refusal;  // empty: it can
  std::string form;
};
std::vector<TierAnswer> forward_tiers(const AttentionProblem& problem, const DeviceFacts& device);
std::vector<TierAnswer> backward_tiers(const AttentionProblem& problem, const BackwardTensors& tensors,
                                       const DeviceFacts& device);
// Serves a call by the named tier alone, or throws its refusal: for tests and benchmarks. An empty name undoes it.
void force_tier(const std::string& name);

}  // namespace torch_attn::cuda
