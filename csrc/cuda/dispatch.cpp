// Which tier serves a call, and the order of the backward pass's kernels. Plain C++: no CUDA header.
#include <mutex>
#include <stdexcept>

#include "device_info.h"
#include "kernels.h"
#include "shared_kernels.h"
#include "tier.h"

namespace torch_attn::cuda {
namespace {

const Tier* const kTiers[] = {&sm80::kTier, &simt::kTier};

std::mutex forced_tier_mutex;
std::string forced_tier;  // empty: none

std::vector<TierAnswer> ask_tiers(const Call& call) {
  const std::string forced = forced_tier_name();
  std::vector<TierAnswer> answers;
  for (const Tier* tier : kTiers) {
    std::string refusal = tier->refusal(call);
    if (refusal.empty() && !forced.empty() && forced != tier->name) refusal = "the tier " + forced + " is forced";
    answers.push_back({tier->name, refusal});
  }
  return answers;
}

// The first tier that can serve the call; if there is none, the error says why each cannot.
const Tier& choose_tier(const Call& call) {
  const std::vector<TierAnswer> answers = ask_tiers(call);
  std::string reasons;
  for (size_t i = 0; i < answers.size(); ++i) {
    if (answers[i].refusal.empty()) return *kTiers[i];
    reasons += std::string(reasons.empty() ? "" : "; ") + answers[i].tier + ": " + answers[i].refusal;
  }
  throw std::invalid_argument("no CUDA kernel can serve this call (" + reasons + ")");
}

template <class T>
void backward_around(const Tier& tier, const AttentionProblem& p, const BackwardTensors& t, void* workspace,
                     const Stream& stream) {
  row_statistics<T>(p, t, workspace, stream);
  if (t.grad_query.defined() || t.grad_alibi_slopes) tier.query_gradient(p, t, workspace, stream);
  if (t.grad_alibi_slopes) slope_gradient<T>(p, t, workspace, stream);
  if (t.grad_key.defined() || t.grad_value.defined()) tier.key_value_gradient(p, t, workspace, stream);
  if (t.grad_attn_mask.defined()) simt::mask_gradient<T>(p, t, workspace, stream);
}

}  // namespace

void attention_forward(const AttentionProblem& p, const ForwardOutputs& outputs, const Stream& stream) {
  set_device(stream.device);
  choose_tier({p, nullptr, compute_capability(stream.device)}).forward(p, outputs, stream);
}

size_t backward_workspace_bytes(const AttentionProblem& p) {
  constexpr int kArrays = 3;  // see RowStatistics
  return static_cast<size_t>(kArrays * p.batch * p.heads * p.query_length) *
         (p.dtype == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
}

void attention_backward(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  set_device(stream.device);
  const Tier& tier = choose_tier({p, &t, compute_capability(stream.device)});
  switch (p.dtype) {
    case ScalarType::kFloat64:
      return backward_around<double>(tier, p, t, workspace, stream);
    case ScalarType::kFloat32:
      return backward_around<float>(tier, p, t, workspace, stream);
    case ScalarType::kBFloat16:
      return backward_around<BFloat16>(tier, p, t, workspace, stream);
    case ScalarType::kFloat16:
      return backward_around<Float16>(tier, p, t, workspace, stream);
    case ScalarType::kBool:
      break;
  }
  throw std::invalid_argument("attention on CUDA takes float64, float32, bfloat16 and float16");
}

std::vector<TierAnswer> forward_tiers(const AttentionProblem& p, const Stream& stream) {
  return ask_tiers({p, nullptr, compute_capability(stream.device)});
}

std::vector<TierAnswer> backward_tiers(const AttentionProblem& p, const BackwardTensors& t, const Stream& stream) {
  return ask_tiers({p, &t, compute_capability(stream.device)});
}

std::string forced_tier_name() {
  const std::lock_guard<std::mutex> lock(forced_tier_mutex);
  return forced_tier;
}

void force_tier(const std::string& name) {
  bool known = name.empty();
  for (const Tier* tier : kTiers) known = known || name == tier->name;
  if (!known) throw std::invalid_argument("there is no CUDA tier named " + name);
  const std::lock_guard<std::mutex> lock(forced_tier_mutex);
  forced_tier = name;
}

}  // namespace torch_attn::cuda
