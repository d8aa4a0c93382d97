// What dispatch.cpp asks of a tier: a family of kernels for some kind of GPU, type and size.
#pragma once

#include <string>

#include "kernels.h"

namespace torch_attn::cuda {

struct Call {
  const AttentionProblem& problem;
  const BackwardTensors* backward;  // null: a forward call
  DeviceFacts device;
};

// How a tier would serve a call.
struct Plan {
  std::string refusal;           // why it cannot; empty: it can
  std::string form;              // which of its kernels, in words
  size_t workspace_bytes = 0;    // scratch memory; of a backward call, beside the row statistics
  bool fused_gradients = false;  // the gradients of query, key and value come from one kernel, all_gradients
};

struct Tier {
  const char* name;
  Plan (*plan)(const Call&);
  void (*forward)(const Call&, const ForwardOutputs&, void* workspace, const Stream&);
  // The next three are null in a tier whose backward calls are all planned as fused_gradients. The statistics are those
  // of row_statistics.cuh.
  // query_gradient also writes each row's part of grad_alibi_slopes, if wanted.
  void (*query_gradient)(const AttentionProblem&, const BackwardTensors&, void* statistics, const Stream&);
  void (*key_value_gradient)(const AttentionProblem&, const BackwardTensors&, void* statistics, const Stream&);
  void (*mask_gradient)(const AttentionProblem&, const BackwardTensors&, void* statistics, const Stream&);
  // Null in a tier that never plans fused_gradients.
  void (*all_gradients)(const AttentionProblem&, const BackwardTensors&, void* statistics, void* workspace,
                        const Stream&);
};

// Of the families of kernels that sm90 has not, sm80 has for some calls and simt for all, given why sm80 refuses a call
// (empty: it does not): each tier's answer, and whether sm80 serves it. The latter throws where a forced tier refuses.
std::vector<TierAnswer> answers_of_two(const std::string& sm80_refusal);
bool is_served_by_sm80(const std::string& sm80_refusal);

namespace sm90 {
extern const Tier kTier;
}
namespace sm80 {
extern const Tier kTier;
}
namespace simt {
extern const Tier kTier;
}

}  // namespace torch_attn::cuda
