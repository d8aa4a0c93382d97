// Shapes, dtypes and layouts of the operators on attention maps; see meta/attention.cpp.
#include "ops/check.h"
#include "ops/map_outputs.h"

namespace torch_attn::ops {
namespace {

StatisticsResult attention_statistics_forward_meta(const StatisticsArguments& a) {
  check_arguments(a);
  return empty_statistics(a);
}

WeightsResult attention_weights_forward_meta(const WeightsArguments& a) {
  check_arguments(a);
  return empty_weights(a);
}

WithWeightsResult attention_with_weights_forward_meta(const WithWeightsArguments& a) {
  check_arguments(a.forward());
  return empty_with_weights(a);
}

template <class Arguments>
MapBackwardResult gradients_meta(const Arguments& a) {
  check_arguments(a);
  const auto by_row = [&](MapGradient gradient, const Tensor& input) {
    return a.output_mask[gradient] ? empty_by_row_like(input) : no_gradient(a.query);
  };
  const auto contiguous = [&](MapGradient gradient, const OptionalTensor& input) {
    return a.output_mask[gradient] ? at::empty_symint(input->sym_sizes(), input->options()) : no_gradient(a.query);
  };
  return {by_row(kMapQuery, a.query), by_row(kMapKey, a.key), contiguous(kMapAttnMask, a.options.attn_mask),
          contiguous(kMapAlibiSlopes, a.options.alibi_slopes), contiguous(kMapSinks, a.options.sinks)};
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, Meta, m) {
  m.impl("attention_statistics_forward", AttentionStatisticsForward::kernel<attention_statistics_forward_meta>);
  m.impl("attention_statistics_backward",
         AttentionStatisticsBackward::kernel<gradients_meta<StatisticsBackwardArguments>>);
  m.impl("attention_weights_forward", AttentionWeightsForward::kernel<attention_weights_forward_meta>);
  m.impl("attention_with_weights_forward", AttentionWithWeightsForward::kernel<attention_with_weights_forward_meta>);
  m.impl("attention_weights_backward", AttentionWeightsBackward::kernel<gradients_meta<WeightsBackwardArguments>>);
}

}  // namespace torch_attn::ops
