// The portable tier: serves every call, on every GPU that the library is built for.
#include "../tier.h"

#include "../with_type.h"
#include "variants.h"

namespace torch_attn::cuda::simt {
namespace {

struct Variant {
  ScalarType dtype;
  int columns;
  void (*forward)(const AttentionProblem&, const ForwardOutputs&, const Stream&);
  decltype(Tier::query_gradient) query_gradient;
  decltype(Tier::key_value_gradient) key_value_gradient;
};

#define TA_VARIANT(T, COLUMNS) \
  {kScalarType<T>, COLUMNS, forward<T, COLUMNS>, query_gradient<T, COLUMNS>, key_value_gradient<T, COLUMNS>},
constexpr Variant kVariants[] = {TA_SIMT_VARIANTS(TA_VARIANT)};
#undef TA_VARIANT

// The narrowest variant of the type that holds `columns` at once, or else its widest.
const Variant& variant_for(ScalarType dtype, int64_t columns) {
  const Variant* best = nullptr;
  for (const Variant& v : kVariants)
    if (v.dtype == dtype && (!best || best->columns < columns)) best = &v;
  return *best;
}

Plan plan(const Call& call) {
  Plan result;
  result.form = call.backward ? "one kernel for grad_query, one for grad_key and grad_value" : "one kernel";
  for (const Variant& v : kVariants)
    if (v.dtype == call.problem.dtype) return result;
  result.refusal = "it takes float64, float32, bfloat16 and float16";
  return result;
}

void run_forward(const Call& call, const ForwardOutputs& out, void*, const Stream& stream) {
  const AttentionProblem& p = call.problem;
  variant_for(p.dtype, p.value_dim).forward(p, out, stream);
}
void run_query_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  variant_for(p.dtype, p.head_dim).query_gradient(p, t, workspace, stream);
}
void run_key_value_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace,
                            const Stream& stream) {
  variant_for(p.dtype, p.head_dim > p.value_dim ? p.head_dim : p.value_dim).key_value_gradient(p, t, workspace, stream);
}

void run_mask_gradient(const AttentionProblem& p, const BackwardTensors& t, void* statistics, const Stream& stream) {
  with_type(p.dtype, [&](auto tag) { mask_gradient<typename decltype(tag)::Type>(p, t, statistics, stream); });
}

}  // namespace

const Tier kTier = {"simt", plan, run_forward, run_query_gradient, run_key_value_gradient, run_mask_gradient, nullptr};

}  // namespace torch_attn::cuda::simt
