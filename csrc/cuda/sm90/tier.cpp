// The Hopper tier: plain calls (scaled scores with a band mask) in float16 and bfloat16, on sm_90a; of their gradients,
// what one kernel computes that adds with atomics.
#include "../tier.h"

#include "../sm80/key_splits.h"
#include "../sm80/query_sums.h"
#include "../sm80/requirements.h"
#include "variants.h"

namespace torch_attn::cuda::sm90 {
namespace {

struct Variant {
  ScalarType dtype;
  int dim;
  void (*forward)(const AttentionProblem&, const ForwardOutputs&, const Stream&);
  decltype(Tier::all_gradients) all_gradients;
};

#define TA_VARIANT(T, DIM) {kScalarType<T>, DIM, forward<T, DIM>, all_gradients<T, DIM>},
constexpr Variant kVariants[] = {TA_SM90_VARIANTS(TA_VARIANT)};
#undef TA_VARIANT

const Variant* variant_for(const AttentionProblem& p) {
  const int64_t widest = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const Variant* best = nullptr;
  for (const Variant& v : kVariants)
    if (v.dtype == p.dtype && v.dim >= widest && (!best || v.dim < best->dim)) best = &v;
  return best;
}

// Of gradients, once the call's problem is served.
std::string refusal_of_gradients(const Call& call) {
  const BackwardTensors& t = *call.backward;
  const int piece = sm80::piece(call.problem);
  if (t.deterministic) return "its gradients are sums of atomics, and deterministic ones are wanted";
  if (!t.grad_query.defined() || (!t.grad_key.defined() && !t.grad_value.defined()))
    return "it computes grad_query together with grad_key and grad_value";
  if (!sm80::is_aligned(t.grad_out, piece) || !sm80::is_aligned(t.grad_query, piece) ||
      !sm80::is_aligned(t.grad_key, piece) || !sm80::is_aligned(t.grad_value, piece))
    return "grad_out and the gradients must start at, and have strides of, multiples of 16 bytes";
  return "";
}

std::string refusal(const Call& call) {
  const AttentionProblem& p = call.problem;
  if (call.device.compute_capability != 90) return "it needs compute capability 9.0";
#if !defined(TORCH_ATTN_HAS_SM90A)
  return "the library was built without machine code for sm_90a";
#endif
  if (!sm80::is_16bit(p)) return "it takes float16 and bfloat16";
  if (p.softcap != 0 || p.attn_mask.defined() || p.alibi_slopes.defined() || p.dropout_p > 0 || p.key.pages != nullptr)
    return "it has no softcap, ALiBi, attn_mask, dropout or paged cache";
  if (p.scale <= 0) return "scale must be positive";
  const int piece = sm80::piece(p);
  if (p.head_dim % piece || p.value_dim % piece || p.head_dim == 0 || p.value_dim == 0)
    return "head_dim and value_dim must be multiples of " + std::to_string(piece);
  if (!variant_for(p)) return "head_dim and value_dim must be at most 128";
  if (!sm80::is_aligned(p.query, piece) || !sm80::is_aligned(p.key, piece) || !sm80::is_aligned(p.value, piece))
    return "query, key and value must start at, and have strides of, multiples of 16 bytes";
  if (call.backward) return refusal_of_gradients(call);
  if (sm80::key_splits(p, 2 * call.device.multiprocessors) != 0) return "few rows want their keys split";
  return "";
}

Plan plan(const Call& call) {
  Plan result;
  result.refusal = refusal(call);
  result.form = "one kernel";
  if (call.backward && result.refusal.empty()) {
    result.form = "one kernel for grad_query, grad_key and grad_value, which adds with atomics";
    result.fused_gradients = true;
    result.workspace_bytes = sm80::QuerySums::bytes(call.problem, variant_for(call.problem)->dim);
  }
  return result;
}

void run_forward(const Call& call, const ForwardOutputs& out, void*, const Stream& stream) {
  variant_for(call.problem)->forward(call.problem, out, stream);
}

void run_all_gradients(const AttentionProblem& p, const BackwardTensors& t, void* statistics, void* workspace,
                       const Stream& stream) {
  variant_for(p)->all_gradients(p, t, statistics, workspace, stream);
}

}  // namespace

const Tier kTier = {"sm90", plan, run_forward, nullptr, nullptr, nullptr, run_all_gradients};

}  // namespace torch_attn::cuda::sm90
