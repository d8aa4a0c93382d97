// The functions of map_kernels.h: which tier serves a call, and the order of the backward pass's kernels. Plain C++: no
// CUDA header.
#include "device_info.h"
#include "map_kernels.h"
#include "shared_kernels.h"
#include "simt/map_variants.h"
#include "sm80/map_variants.h"
#include "sm80/requirements.h"
#include "tier.h"
#include "with_type.h"

namespace torch_attn::cuda {
namespace {

// t: null in a forward call.
std::string sm80_refusal(const AttentionProblem& p, const BackwardTensors* t, const DeviceFacts& device) {
  if (std::string why = sm80::refusal_of_type(p, device); !why.empty()) return why;
  const int piece = sm80::piece(p);
  if (p.head_dim % piece || p.head_dim == 0) return "head_dim must be a multiple of " + std::to_string(piece);
  const int64_t widest = 512 / sm80::element_bytes(p);  // three tiles of such rows fit into any GPU's shared memory
  if (p.head_dim > widest) return "head_dim must be at most " + std::to_string(widest);
  if (!sm80::is_aligned(p.query, piece) || !sm80::is_aligned(p.key, piece))
    return "query and key must start at, and have strides of, multiples of 16 bytes";
  if (t && (!sm80::is_aligned(t->grad_query, piece) || !sm80::is_aligned(t->grad_key, piece)))
    return "the gradients must start at, and have strides of, multiples of 16 bytes";
  return "";
}

// Calls on_sm80(TypeTag<T>) or on_simt(TypeTag<T>) with the element type.
template <class OnSm80, class OnSimt>
void with_tier(const AttentionProblem& p, const BackwardTensors* t, const Stream& stream, const OnSm80& on_sm80,
               const OnSimt& on_simt) {
  set_device(stream.device);
  const bool tensor_cores = is_served_by_sm80(sm80_refusal(p, t, device_facts(stream.device)));
  with_type(p.dtype, [&](auto tag) {
    if constexpr (!std::is_same_v<typename decltype(tag)::Type, double>)
      if (tensor_cores) return on_sm80(tag);
    on_simt(tag);
  });
}

}  // namespace

std::vector<TierAnswer> map_forward_tiers(const AttentionProblem& p, const DeviceFacts& device) {
  return answers_of_two(sm80_refusal(p, nullptr, device));
}
std::vector<TierAnswer> map_backward_tiers(const AttentionProblem& p, const BackwardTensors& t,
                                           const DeviceFacts& device) {
  return answers_of_two(sm80_refusal(p, &t, device));
}

size_t map_forward_workspace_bytes(const AttentionProblem& p) { return bytes_of_rows(p, 1); }
size_t map_backward_workspace_bytes(const AttentionProblem& p) { return bytes_of_rows(p, kRowStatistics); }

void attention_statistics(const AttentionProblem& p, const StatisticsOutputs& outputs, void* workspace,
                          const Stream& stream) {
  with_tier(
      p, nullptr, stream,
      [&](auto tag) { sm80::map_statistics<typename decltype(tag)::Type>(p, outputs, workspace, stream); },
      [&](auto tag) { simt::map_statistics<typename decltype(tag)::Type>(p, outputs, workspace, stream); });
}

void attention_weights(const AttentionProblem& p, const WeightsOutputs& outputs, void* workspace,
                       const Stream& stream) {
  with_tier(
      p, nullptr, stream,
      [&](auto tag) {
        using T = typename decltype(tag)::Type;
        map_weight_scales<T>(p, outputs.logsumexp, workspace, stream);
        sm80::map_weights<T>(p, outputs, workspace, stream);
      },
      [&](auto tag) {
        using T = typename decltype(tag)::Type;
        map_weight_scales<T>(p, outputs.logsumexp, workspace, stream);
        simt::map_weights<T>(p, outputs, workspace, stream);
      });
}

void attention_map_backward(const AttentionProblem& p, const MapBackwardTensors& t, void* workspace,
                            const Stream& stream) {
  const bool any_unknown = t.column_sum || t.weights.defined();
  const bool for_query = t.grad_query.defined() || t.grad_alibi_slopes;
  with_tier(
      p, &t, stream,
      [&](auto tag) {
        using T = typename decltype(tag)::Type;
        map_row_statistics<T>(p, t, workspace, stream);
        if (any_unknown) sm80::map_row_terms<T>(p, t, workspace, stream);
        if (for_query) sm80::map_query_gradient<T>(p, t, workspace, stream);
        if (t.grad_key.defined()) sm80::map_key_gradient<T>(p, t, workspace, stream);
        if (t.grad_attn_mask.defined()) sm80::map_mask_gradient<T>(p, t, workspace, stream);
      },
      [&](auto tag) {
        using T = typename decltype(tag)::Type;
        map_row_statistics<T>(p, t, workspace, stream);
        if (any_unknown) simt::map_row_terms<T>(p, t, workspace, stream);
        if (for_query) simt::map_query_gradient<T>(p, t, workspace, stream);
        if (t.grad_key.defined()) simt::map_key_gradient<T>(p, t, workspace, stream);
        if (t.grad_attn_mask.defined()) simt::map_mask_gradient<T>(p, t, workspace, stream);
      });
  if (t.grad_alibi_slopes)
    with_type(p.dtype, [&](auto tag) { slope_gradient<typename decltype(tag)::Type>(p, t, workspace, stream); });
}

}  // namespace torch_attn::cuda
