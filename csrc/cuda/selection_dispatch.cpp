// Which kernels serve a call of hard attention, and the order of the backward pass's. Plain C++: no CUDA header.
#include <stdexcept>
#include <string>

#include "device_info.h"
#include "selection_kernels.h"
#include "shared_kernels.h"
#include "simt/selection_variants.h"
#include "sm80/selection_variants.h"
#include "tier.h"

namespace torch_attn::cuda {
namespace {

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls body(TypeTag<T>) with the element type.
template <class Body>
void with_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return body(TypeTag<double>());
    case ScalarType::kFloat32:
      return body(TypeTag<float>());
    case ScalarType::kBFloat16:
      return body(TypeTag<BFloat16>());
    case ScalarType::kFloat16:
      return body(TypeTag<Float16>());
    case ScalarType::kBool:
      break;
  }
  throw std::invalid_argument("hard attention on CUDA takes float64, float32, bfloat16 and float16");
}

bool is_aligned_to_pieces(const TensorView& view) {  // of 16 bytes
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int dimension = 0; dimension < 3; ++dimension) aligned = aligned && view.stride[dimension] % 8 == 0;
  return aligned;
}

// select_keys on tensor cores. Its backward pass is simt's alone.
std::string sm80_refusal(const AttentionProblem& p, int compute_capability) {
  if (compute_capability < 80) return "it needs compute capability 8.0";
  if (p.dtype != ScalarType::kFloat16 && p.dtype != ScalarType::kBFloat16) return "it takes float16 and bfloat16";
  if (p.head_dim % 8 || p.head_dim == 0 || p.head_dim > 128) return "head_dim must be a multiple of 8, at most 128";
  if (!is_aligned_to_pieces(p.query) || !is_aligned_to_pieces(p.key))
    return "query and key must start at, and have strides of, multiples of 16 bytes";
  return "";
}

template <class T>
void select_keys_sm80(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs,
                      void* workspace, const Stream& stream) {
  const auto kernel = p.head_dim <= 64 ? sm80::select_keys<T, 64> : sm80::select_keys<T, 128>;
  kernel(p, selection, outputs, workspace, stream);
}

}  // namespace

size_t select_keys_workspace_bytes(const AttentionProblem& p, const Selection& selection) {
  if (selection.rule == SelectionRule::kHighest) return 0;
  return static_cast<size_t>(p.batch * p.heads * p.query_length * selection.count) *
         (p.dtype == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
}

void select_keys(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs,
                 void* workspace, const Stream& stream) {
  set_device(stream.device);
  const std::string forced = forced_tier_name(),
                    refusal = sm80_refusal(p, device_facts(stream.device).compute_capability);
  if (forced == "sm80" && !refusal.empty())
    throw std::invalid_argument("no CUDA kernel can serve this call (sm80: " + refusal +
                                "; simt: the tier sm80 is forced)");
  if (refusal.empty() && forced != "simt") {
    const auto select = p.dtype == ScalarType::kFloat16 ? select_keys_sm80<Float16> : select_keys_sm80<BFloat16>;
    return select(p, selection, outputs, workspace, stream);
  }
  with_type(p.dtype, [&](auto tag) {
    simt::select_keys<typename decltype(tag)::Type>(p, selection, outputs, workspace, stream);
  });
}

size_t select_keys_backward_workspace_bytes(const AttentionProblem& p) {
  constexpr int64_t kArrays = 3;  // see RowStatistics
  return static_cast<size_t>(kArrays * p.batch * p.heads * p.query_length) *
         (p.dtype == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
}

void select_keys_backward(const AttentionProblem& p, const SelectionBackwardTensors& t, void* workspace,
                          const Stream& stream) {
  set_device(stream.device);
  with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::Type;
    constexpr int kColumns = simt::kSelectionColumns;
    row_statistics<T>(p, t, workspace, stream);
    if (t.grad_query.defined() || t.grad_alibi_slopes)
      simt::selection_query_gradient<T, kColumns>(p, t, workspace, stream);
    if (t.grad_alibi_slopes) slope_gradient<T>(p, t, workspace, stream);
    if (t.grad_key.defined()) simt::selection_key_gradient<T, kColumns>(p, t, workspace, stream);
    if (t.grad_attn_mask.defined()) simt::selection_mask_gradient<T>(p, t, workspace, stream);
  });
}

void gather_rows(const RowChoice& choice, const TensorView& source, const TensorView& out, const Stream& stream) {
  set_device(stream.device);
  with_type(out.dtype, [&](auto tag) { simt::gather_rows<typename decltype(tag)::Type>(choice, source, out, stream); });
}

void scatter_rows(const RowChoice& choice, const TensorView& rows, const TensorView& out, const Stream& stream) {
  set_device(stream.device);
  with_type(out.dtype, [&](auto tag) { simt::scatter_rows<typename decltype(tag)::Type>(choice, rows, out, stream); });
}

void chosen_dots(const RowChoice& choice, const TensorView& rows, const TensorView& source, void* dots,
                 const Stream& stream) {
  set_device(stream.device);
  with_type(rows.dtype,
            [&](auto tag) { simt::chosen_dots<typename decltype(tag)::Type>(choice, rows, source, dots, stream); });
}

}  // namespace torch_attn::cuda
