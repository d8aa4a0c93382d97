// What dispatch.cpp asks of a tier: a family of kernels for some kind of GPU, type and size.
#pragma once

#include <string>

#include "kernels.h"

namespace torch_attn::cuda {

struct Call {
  const AttentionProblem& problem;
  const BackwardTensors* backward;  // null: a forward call
  int compute_capability;           // 80 for sm_80
};

struct Tier {
  const char* name;
  std::string (*refusal)(const Call&);  // why it cannot serve the call; empty: it can
  void (*forward)(const AttentionProblem&, const ForwardOutputs&, const Stream&);
  // The workspace holds the row statistics. query_gradient also writes each row's part of grad_alibi_slopes, if wanted.
  void (*query_gradient)(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);
  void (*key_value_gradient)(const AttentionProblem&, const BackwardTensors&, void* workspace, const Stream&);
};

// The tier that force_tier named; empty: none.
std::string forced_tier_name();

namespace sm80 {
extern const Tier kTier;
}
namespace simt {
extern const Tier kTier;
}

}  // namespace torch_attn::cuda
