// The tensor-core tier for sm_80 and newer: float16 and bfloat16, 16-byte aligned, head dimensions up to 256.
#include "../tier.h"

#include "variants.h"

namespace torch_attn::cuda::sm80 {
namespace {

struct Variant {
  ScalarType dtype;
  int dim;
  bool full;
  decltype(Tier::forward) forward;
  decltype(Tier::query_gradient) query_gradient;
  decltype(Tier::key_value_gradient) key_value_gradient;
};

#define TA_KIND(T, DIM, FULL) \
  {kScalarType<T>, DIM, FULL, forward<T, DIM, FULL>, query_gradient<T, DIM, FULL>, key_value_gradient<T, DIM, FULL>},
#define TA_VARIANT(T, DIM) TA_KIND(T, DIM, false) TA_KIND(T, DIM, true)
constexpr Variant kVariants[] = {TA_SM80_VARIANTS(TA_VARIANT)};
#undef TA_VARIANT
#undef TA_KIND

int64_t widest(const AttentionProblem& p) { return p.head_dim > p.value_dim ? p.head_dim : p.value_dim; }

// The narrowest variant that serves the problem, or null. Plain kernels fold the scale into the running maximum, so
// they need a positive one.
const Variant* variant_for(const AttentionProblem& p, bool full) {
  full = full || p.softcap != 0 || p.attn_mask.defined() || p.alibi_slopes.defined() || p.dropout_p > 0 || p.scale <= 0;
  const Variant* best = nullptr;
  for (const Variant& v : kVariants)
    if (v.dtype == p.dtype && v.full == full && v.dim >= widest(p) && (!best || v.dim < best->dim)) best = &v;
  return best;
}

constexpr int kPiece = 8;  // elements of 16 bytes

bool is_aligned(const TensorView& view) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int dimension = 0; dimension < 3; ++dimension) aligned = aligned && view.stride[dimension] % kPiece == 0;
  return aligned;
}

std::string refusal(const Call& call) {
  const AttentionProblem& p = call.problem;
  if (call.compute_capability < 80) return "it needs compute capability 8.0";
  if (p.dtype != ScalarType::kFloat16 && p.dtype != ScalarType::kBFloat16) return "it takes float16 and bfloat16";
  if (p.head_dim % kPiece || p.value_dim % kPiece || p.head_dim == 0 || p.value_dim == 0)
    return "head_dim and value_dim must be multiples of 8";
  if (!variant_for(p, false)) return "head_dim and value_dim must be at most 256";
  // sm_86, sm_89 and sm_12x have 99 KiB of shared memory in a block; the widest gradient kernels need 128.
  const int sm = call.compute_capability;
  const bool small_shared_memory = sm == 86 || sm == 89 || sm / 10 == 12;
  if (call.backward && small_shared_memory && widest(p) > 128)
    return "this GPU's shared memory is too small for gradients of head dimensions above 128";
  if (!is_aligned(p.query) || !is_aligned(p.key) || !is_aligned(p.value))
    return "query, key and value must start at, and have strides of, multiples of 16 bytes";
  if (const BackwardTensors* t = call.backward) {
    if (!is_aligned(t->grad_out) || !is_aligned(t->grad_query) || !is_aligned(t->grad_key) ||
        !is_aligned(t->grad_value))
      return "grad_out and the gradients must start at, and have strides of, multiples of 16 bytes";
  }
  return "";
}

void run_forward(const AttentionProblem& p, const ForwardOutputs& out, const Stream& stream) {
  variant_for(p, false)->forward(p, out, stream);
}
void run_query_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace, const Stream& stream) {
  variant_for(p, t.grad_alibi_slopes != nullptr)->query_gradient(p, t, workspace, stream);
}
void run_key_value_gradient(const AttentionProblem& p, const BackwardTensors& t, void* workspace,
                            const Stream& stream) {
  variant_for(p, false)->key_value_gradient(p, t, workspace, stream);
}

}  // namespace

const Tier kTier = {"sm80", refusal, run_forward, run_query_gradient, run_key_value_gradient};

}  // namespace torch_attn::cuda::sm80
