// Which kernels serve a call of hard attention, and the order of the backward pass's. Plain C++: no CUDA header.
#include "device_info.h"
#include "selection_kernels.h"
#include "shared_kernels.h"
#include "simt/selection_variants.h"
#include "sm80/requirements.h"
#include "sm80/selection_variants.h"
#include "tier.h"
#include "with_type.h"

namespace torch_attn::cuda {
namespace {

// select_keys on tensor cores. Its backward pass is simt's alone.
std::string sm80_refusal(const AttentionProblem& p, const DeviceFacts& device) {
  if (!sm80::is_16bit(p)) return "it takes float16 and bfloat16";
  if (std::string why = sm80::refusal_of_type(p, device); !why.empty()) return why;
  const int piece = sm80::piece(p);
  if (p.head_dim % piece || p.head_dim == 0 || p.head_dim > 128) return "head_dim must be a multiple of 8, at most 128";
  if (!sm80::is_aligned(p.query, piece) || !sm80::is_aligned(p.key, piece))
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

std::vector<TierAnswer> select_keys_tiers(const AttentionProblem& p, const DeviceFacts& device) {
  return answers_of_two(sm80_refusal(p, device));
}
std::vector<TierAnswer> select_keys_backward_tiers() { return answers_of_two("it has no gradients of hard attention"); }

size_t select_keys_workspace_bytes(const AttentionProblem& p, const Selection& selection) {
  if (selection.rule == SelectionRule::kHighest) return 0;
  return bytes_of_rows(p, static_cast<size_t>(selection.count));
}

void select_keys(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs,
                 void* workspace, const Stream& stream) {
  set_device(stream.device);
  if (is_served_by_sm80(sm80_refusal(p, device_facts(stream.device)))) {
    const auto select = p.dtype == ScalarType::kFloat16 ? select_keys_sm80<Float16> : select_keys_sm80<BFloat16>;
    return select(p, selection, outputs, workspace, stream);
  }
  with_type(p.dtype, [&](auto tag) {
    simt::select_keys<typename decltype(tag)::Type>(p, selection, outputs, workspace, stream);
  });
}

size_t select_keys_backward_workspace_bytes(const AttentionProblem& p) { return bytes_of_rows(p, kRowStatistics); }

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
