// Which tier serves a call, and the order of the backward pass's kernels. Plain C++: no CUDA header.
#include <mutex>
#include <stdexcept>

#include "device_info.h"
#include "kernels.h"
#include "shared_kernels.h"
#include "tier.h"
#include "with_type.h"

namespace torch_attn::cuda {
namespace {

const Tier* const kTiers[] = {&sm90::kTier, &sm80::kTier, &simt::kTier};

std::mutex forced_tier_mutex;
const Tier* forced_tier = nullptr;  // null: none

// What a tier answers to a call, and what force_tier says to that.
Plan with_forced_tier(const Tier* tier, Plan plan) {
  const std::lock_guard<std::mutex> lock(forced_tier_mutex);
  const Tier* const forced = forced_tier;
  if (plan.refusal.empty() && forced && forced != tier)
    plan.refusal = std::string("the tier ") + forced->name + " is forced";
  return plan;
}

std::vector<Plan> ask_tiers(const Call& call) {
  std::vector<Plan> plans;
  for (const Tier* tier : kTiers) plans.push_back(with_forced_tier(tier, tier->plan(call)));
  return plans;
}
std::vector<Plan> plans_of_two(const std::string& sm80_refusal) {
  Plan sm90, sm80, simt;
  sm90.refusal = "it has attention alone";
  sm80.refusal = sm80_refusal;
  sm80.form = "on tensor cores";
  simt.form = "any type and size";
  return {with_forced_tier(&sm90::kTier, sm90), with_forced_tier(&sm80::kTier, sm80),
          with_forced_tier(&simt::kTier, simt)};
}

// plans: of each tier, none of which can serve the call.
[[noreturn]] void refuse(const std::vector<Plan>& plans) {
  std::string reasons;
  for (size_t i = 0; i < plans.size(); ++i)
    reasons += std::string(reasons.empty() ? "" : "; ") + kTiers[i]->name + ": " + plans[i].refusal;
  throw std::invalid_argument("no CUDA kernel can serve this call (" + reasons + ")");
}

// The first that can serve the call.
size_t first_to_serve(const std::vector<Plan>& plans) {
  for (size_t i = 0; i < plans.size(); ++i)
    if (plans[i].refusal.empty()) return i;
  refuse(plans);
}

struct Choice {
  const Tier& tier;
  Plan plan;
};

// Asks no further tier than it must: a small call takes little longer than this.
Choice choose(const Call& call) {
  std::vector<Plan> refused;
  for (const Tier* tier : kTiers) {
    Plan plan = with_forced_tier(tier, tier->plan(call));
    if (plan.refusal.empty()) return {*tier, std::move(plan)};
    refused.push_back(std::move(plan));
  }
  refuse(refused);
}

std::vector<TierAnswer> answers(const std::vector<Plan>& plans) {
  std::vector<TierAnswer> result;
  for (size_t i = 0; i < plans.size(); ++i) result.push_back({kTiers[i]->name, plans[i].refusal, plans[i].form});
  return result;
}

// Rounded up, so that what follows them is aligned.
size_t statistics_bytes(const AttentionProblem& p) {
  constexpr size_t kAlignment = 128;
  return (bytes_of_rows(p, kRowStatistics) + kAlignment - 1) / kAlignment * kAlignment;
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
  if (t.grad_attn_mask.defined()) tier.mask_gradient(p, t, workspace, stream);
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
  with_type(p.dtype, [&](auto tag) { backward_by<typename decltype(tag)::Type>(choice, p, t, workspace, stream); });
}

std::vector<TierAnswer> forward_tiers(const AttentionProblem& p, const DeviceFacts& device) {
  return answers(ask_tiers({p, nullptr, device}));
}

std::vector<TierAnswer> backward_tiers(const AttentionProblem& p, const BackwardTensors& t, const DeviceFacts& device) {
  return answers(ask_tiers({p, &t, device}));
}

std::vector<TierAnswer> answers_of_two(const std::string& sm80_refusal) { return answers(plans_of_two(sm80_refusal)); }
bool is_served_by_sm80(const std::string& sm80_refusal) {
  return kTiers[first_to_serve(plans_of_two(sm80_refusal))] == &sm80::kTier;
}

void force_tier(const std::string& name) {
  const Tier* found = nullptr;
  for (const Tier* tier : kTiers)
    if (name == tier->name) found = tier;
  if (!found && !name.empty()) throw std::invalid_argument("there is no CUDA tier named " + name);
  const std::lock_guard<std::mutex> lock(forced_tier_mutex);
  forced_tier = found;
}

}  // namespace torch_attn::cuda
