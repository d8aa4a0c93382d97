// The tensor-core tier for sm_80 and newer: float16, bfloat16 and, where TF32 is allowed, float32; 16-byte aligned,
// with rows of up to 512 bytes.
#include "../tier.h"

#include "../with_type.h"
#include "key_splits.h"
#include "map_variants.h"
#include "query_sums.h"
#include "requirements.h"
#include "variants.h"

namespace torch_attn::cuda::sm80 {
namespace {

struct Variant {
  ScalarType dtype;
  int dim;
  bool full;
  void (*forward)(const AttentionProblem&, const ForwardOutputs&, const Stream&);
  void (*decode)(const AttentionProblem&, int splits, void* workspace, const Stream&);
  void (*combine)(const AttentionProblem&, const ForwardOutputs&, int splits, void* workspace, const Stream&);
  decltype(Tier::query_gradient) query_gradient;
  decltype(Tier::key_value_gradient) key_value_gradient;
};

#define TA_KIND(T, DIM, FULL)    \
  {kScalarType<T>,               \
   DIM,                          \
   FULL,                         \
   forward<T, DIM, FULL>,        \
   decode<T, DIM, FULL>,         \
   combine<T>,                   \
   query_gradient<T, DIM, FULL>, \
   key_value_gradient<T, DIM, FULL>},
#define TA_VARIANT(T, DIM) TA_KIND(T, DIM, false) TA_KIND(T, DIM, true)
constexpr Variant kVariants[] = {TA_SM80_VARIANTS(TA_VARIANT)};
#undef TA_VARIANT
#undef TA_KIND

struct FusedVariant {
  ScalarType dtype;
  int dim;
  bool full;
  decltype(Tier::all_gradients) all_gradients;
};

#define TA_VARIANT(T, DIM) \
  {kScalarType<T>, DIM, false, all_gradients<T, DIM, false>}, {kScalarType<T>, DIM, true, all_gradients<T, DIM, true>},
constexpr FusedVariant kFusedVariants[] = {TA_SM80_FUSED_VARIANTS(TA_VARIANT)};
#undef TA_VARIANT

int64_t widest(const AttentionProblem& p) { return p.head_dim > p.value_dim ? p.head_dim : p.value_dim; }

// The narrowest variant that serves the problem, or null. Plain kernels fold the scale into the running maximum, so
// they need a positive one.
const Variant* variant_for(const AttentionProblem& p, bool full) {
  full = full || p.softcap != 0 || p.attn_mask.defined() || p.alibi_slopes.defined() || p.dropout_p > 0 ||
         p.scale <= 0 || p.key.pages != nullptr;
  const Variant* best = nullptr;
  for (const Variant& v : kVariants)
    if (v.dtype == p.dtype && v.full == full && v.dim >= widest(p) && (!best || v.dim < best->dim)) best = &v;
  return best;
}

// The one of the same type and width as the two kernels' would be, or null.
const FusedVariant* fused_variant_for(const AttentionProblem& p) {
  const Variant* variant = variant_for(p, false);
  for (const FusedVariant& v : kFusedVariants)
    if (v.dtype == variant->dtype && v.dim == variant->dim && v.full == variant->full) return &v;
  return nullptr;
}

// sm_86, sm_89 and sm_12x have 99 KiB of shared memory in a block; kernels with the widest rows need more.
bool has_small_shared_memory(const Call& call) {
  const int sm = call.device.compute_capability;
  return sm == 86 || sm == 89 || sm / 10 == 12;
}
bool has_wide_rows(const AttentionProblem& p) { return variant_for(p, false)->dim * element_bytes(p) > 256; }

std::string refusal(const Call& call) {
  const AttentionProblem& p = call.problem;
  const bool is_float32 = p.dtype == ScalarType::kFloat32;
  if (std::string why = refusal_of_type(p, call.device); !why.empty()) return why;
  const int piece = sm80::piece(p);
  if (p.head_dim % piece || p.value_dim % piece || p.head_dim == 0 || p.value_dim == 0)
    return "head_dim and value_dim must be multiples of " + std::to_string(piece);
  if (!variant_for(p, false))
    return std::string("head_dim and value_dim must be at most ") + (is_float32 ? "128 in TF32" : "256");
  if (call.backward && has_small_shared_memory(call) && has_wide_rows(p))
    return "this GPU's shared memory is too small for gradients of head dimensions above " +
           std::to_string(256 / element_bytes(p));
  if (!is_aligned(p.query, piece) || !is_aligned(p.key, piece) || !is_aligned(p.value, piece))
    return "query, key and value must start at, and have strides of, multiples of 16 bytes";
  if (p.key.pages != nullptr && (p.key.page_rows & (p.key.page_rows - 1)) != 0)
    return "the blocks of a paged cache must have a power of two of rows";
  if (const BackwardTensors* t = call.backward) {
    if (!is_aligned(t->grad_out, piece) || !is_aligned(t->grad_query, piece) || !is_aligned(t->grad_key, piece) ||
        !is_aligned(t->grad_value, piece))
      return "grad_out and the gradients must start at, and have strides of, multiples of 16 bytes";
  }
  return "";
}

// 0: one block has all keys of its rows.
int splits_for(const Call& call) {
  const bool wide = has_wide_rows(call.problem);
  if (wide && has_small_shared_memory(call)) return 0;
  return key_splits(call.problem, call.device.multiprocessors * (wide ? 1 : 2));
}

// One kernel leaves alibi_slopes' gradient out, and gains nothing where only one of the two would run.
bool is_fused(const Call& call) {
  const BackwardTensors& t = *call.backward;
  const AttentionProblem& p = call.problem;
  if (t.deterministic || !t.grad_query.defined() || t.grad_alibi_slopes) return false;
  if (!t.grad_key.defined() && !t.grad_value.defined()) return false;
  const FusedVariant* variant = fused_variant_for(p);
  if (!variant || (variant->dim > 64 && has_small_shared_memory(call))) return false;
  return is_fused_faster(p, call.device.multiprocessors);
}

Plan plan(const Call& call) {
  Plan result;
  result.refusal = refusal(call);
  if (!result.refusal.empty()) return result;
  const AttentionProblem& p = call.problem;
  const std::string products = p.dtype == ScalarType::kFloat32 ? ", products in TF32" : "";
  if (call.backward && is_fused(call)) {
    result.form = "one kernel for grad_query, grad_key and grad_value, which adds with atomics";
    result.fused_gradients = true;
    result.workspace_bytes = QuerySums::bytes(p, fused_variant_for(p)->dim);
  } else if (call.backward) {
    result.form = "one kernel for grad_query, one for grad_key and grad_value" + products;
  } else if (const int splits = splits_for(call)) {
    result.form = "query heads of a group together, their keys in " + std::to_string(splits) + " parts" + products;
    result.workspace_bytes = Partials::bytes(p, splits);
  } else {
    result.form = "one kernel" + products;
  }
  return result;
}

void run_forward(const Call& call, const ForwardOutputs& out, void* workspace, const Stream& stream) {
  const AttentionProblem& p = call.problem;
  const Variant& variant = *variant_for(p, false);
  if (const int splits = splits_for(call)) {
    variant.decode(p, splits, workspace, stream);
    variant.combine(p, out, splits, workspace, stream);
  } else {
    variant.forward(p, out, stream);
  }
}
void run_query_gradient(const AttentionProblem& p, const BackwardTensors& t, void* statistics, const Stream& stream) {
  variant_for(p, t.grad_alibi_slopes != nullptr)->query_gradient(p, t, statistics, stream);
}
void run_key_value_gradient(const AttentionProblem& p, const BackwardTensors& t, void* statistics,
                            const Stream& stream) {
  variant_for(p, false)->key_value_gradient(p, t, statistics, stream);
}

void run_all_gradients(const AttentionProblem& p, const BackwardTensors& t, void* statistics, void* workspace,
                       const Stream& stream) {
  fused_variant_for(p)->all_gradients(p, t, statistics, workspace, stream);
}

void run_mask_gradient(const AttentionProblem& p, const BackwardTensors& t, void* statistics, const Stream& stream) {
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    if constexpr (!std::is_same_v<T, double>) mask_gradient<T>(p, t, statistics, stream);
  });
}

}  // namespace

const Tier kTier = {"sm80",           plan, run_forward, run_query_gradient, run_key_value_gradient, run_mask_gradient,
                    run_all_gradients};

}  // namespace torch_attn::cuda::sm80
