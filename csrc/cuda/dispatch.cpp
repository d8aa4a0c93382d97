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

// One plan for each of kTiers.
std::vector<Plan> ask_tiers(const Call& call) {
  const std::string forced = forced_tier_name();
  std::vector<Plan> plans;
  for (const Tier* tier : kTiers) {
    Plan plan = tier->plan(call);
    if (plan.refusal.empty() && !forced.empty() && forced != tier->name)
      plan.refusal = "the tier " + forced + " is forced";
    plans.push_back(std::move(plan));
  }
  return plans;
}

struct Choice {
  const Tier& tier;
  Plan plan;
};

// The first tier that can serve the call; if there is none, the error says why each cannot.
Choice choose(const Call& call) {
  const std::vector<Plan> plans = ask_tiers(call);
  std::string reasons;
  for (size_t i = 0; i < plans.size(); ++i) {
    if (plans[i].refusal.empty()) return {*kTiers[i], plans[i]};
    reasons += std::string(reasons.empty() ? "" : "; ") + kTiers[i]->name + ": " + plans[i].refusal;
  }
  throw std::invalid_argument("no CUDA kernel can serve this call (" + reasons + ")");
}

std::vector<TierAnswer> answers(const Call& call) {
  const std::vector<Plan> plans = ask_tiers(call);
  std::vector<TierAnswer> result;
  for (size_t i = 0; i < plans.size(); ++i) result.push_back({kTiers[i]->name, plans[i].refusal, plans[i].form});
  return result;
}

// Rounded up, so that what follows them is aligned.
size_t statistics_bytes(const AttentionProblem& p) {
  constexpr size_t kArrays = 3, kAlignment = 128;  // see RowStatistics
  const size_t rows = static_cast<size_t>(p.all_rows());
  const size_t bytes = kArrays * rows * (p.dtype == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

template <class T>
void backward_by(const Choice& choice, const AttentionProblem& p, const BackwardTensors& t, void* workspace,
                 const Stream& stream) {
  const Tier& tier = choice.tier;
  row_statistics<T>(p, t, workspace, stream);
  if (choice.plan.fused_gradients) {
    tier.all_gradients(p, t, workspace, static_cast<unsigned char*>(workspace) + statistics_bytes(p), stream);
  } else {
    if (t.grad_query.defined() || t.grad_alibi_slopes) tier.query_gradient(p, t, workspace, stream);
    if (t.grad_alibi_slopes) slope_gradient<T>(p, t, workspace, stream);
    if (t.grad_key.defined() || t.grad_value.defined()) tier.key_value_gradient(p, t, workspace, stream);
  }
  if (t.grad_attn_mask.defined()) simt::mask_gradient<T>(p, t, workspace, stream);
}

}  // namespace

size_t forward_workspace_bytes(const AttentionProblem& p, const Stream& stream) {
  return choose({p, nullptr, device_facts(stream.device)}).plan.workspace_bytes;
}

void attention_forward(const AttentionProblem& p, const ForwardOutputs& outputs, void* workspace,
                       const Stream& stream) {
  set_device(stream.device);
  const Call call{p, nullptr, device_facts(stream.device)};
  choose(call).tier.forward(call, outputs, workspace, stream);
}

size_t backward_workspace_bytes(const AttentionProblem& p, const BackwardTensors& t, const Stream& stream) {
  return statistics_bytes(p) + choose({p, &t, device_facts(stream.device)}).plan.workspace_bytes;
}

void attention_backward(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  set_device(stream.device);
  const Choice choice = choose({p, &t, device_facts(stream.device)});
  switch (p.dtype) {
    case ScalarType::kFloat64:
      return backward_by<double>(choice, p, t, workspace, stream);
    case ScalarType::kFloat32:
      return backward_by<float>(choice, p, t, workspace, stream);
    case ScalarType::kBFloat16:
      return backward_by<BFloat16>(choice, p, t, workspace, stream);
    case ScalarType::kFloat16:
      return backward_by<Float16>(choice, p, t, workspace, stream);
    case ScalarType::kBool:
      break;
  }
  throw std::invalid_argument("attention on CUDA takes float64, float32, bfloat16 and float16");
}

std::vector<TierAnswer> forward_tiers(const AttentionProblem& p, const DeviceFacts& device) {
  return answers({p, nullptr, device});
}

std::vector<TierAnswer> backward_tiers(const AttentionProblem& p, const BackwardTensors& t, const DeviceFacts& device) {
  return answers({p, &t, device});
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
