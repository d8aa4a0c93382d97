// The CPU kernels of attention maps as operators.
#include <ATen/ops/argsort.h>

#include <algorithm>

#include "cpu/huge_pages.h"
#include "cpu/map_kernels.h"
#include "ops/cpu/forward_calls.h"
#include "ops/cpu/threads.h"
#include "ops/map_call.h"

namespace torch_attn::ops {
namespace {

// A map fresh from the system takes longer to touch than to compute: see docs/maps.md. Smaller ones come from memory
// that the allocator has used before; larger ones, at 256 MiB, took twice as long as in small pages.
void expect_map(const Tensor& weights) {
  constexpr size_t kSmallest = size_t{1} << 22, kLargest = size_t{1} << 27;
  if (weights.nbytes() < kSmallest || weights.nbytes() > kLargest) return;
  cpu::advise_huge_pages(weights.mutable_data_ptr(), weights.nbytes());
}

StatisticsResult attention_statistics_forward_cpu(const StatisticsArguments& a) {
  return run_statistics(a, [](const AttentionProblem& p, const StatisticsOutputs& outputs) {
    cpu::attention_statistics(p, outputs, torch_threads());
  });
}

WeightsResult attention_weights_forward_cpu(const WeightsArguments& a) {
  SoftmaxOutputs o;
  const auto run = [&o](const AttentionProblem& p, const WeightsOutputs& outputs) {
    static_cast<WeightsOutputs&>(o) = outputs;
    if (o.computed_logsumexp != nullptr) o.logsumexp = nullptr;  // the kernel finds it
    cpu::attention_weights(p, o, torch_threads());
  };
  const auto find_logsumexp = [&](const AttentionProblem& p, void* logsumexp) {
    o.computed_logsumexp = logsumexp;
    if (p.key_length == 0) run(p, {});  // there will be no weights to run for
  };
  return run_weights(a, find_logsumexp, run);
}

WithWeightsResult attention_with_weights_forward_cpu(const WithWeightsArguments& a) {
  const PreparedProblem prepared = make_problem(a.forward(), Tensor());
  const auto [out, weights, logsumexp] = empty_with_weights(a);
  if (logsumexp.numel() == 0) return {out, weights.zero_(), logsumexp};
  expect_map(weights);
  SoftmaxOutputs o;
  o.weights = view_of_matrix(a.mean ? weights.unsqueeze(1) : weights);
  o.mean = a.mean;
  o.computed_logsumexp = logsumexp.mutable_data_ptr();
  o.out = view_of_matrix(out);
  count_forward_call();
  cpu::attention_weights(prepared.problem, o, torch_threads());
  return {out, weights, logsumexp};
}

void run_backward_kernel(const AttentionProblem& p, const MapBackwardTensors& tensors) {
  cpu::attention_map_backward(p, tensors, torch_threads());
}

MapBackwardResult attention_statistics_backward_cpu(const StatisticsBackwardArguments& a) {
  return run_statistics_backward(a, run_backward_kernel);
}

// The kernel wants positions that do not fall: the call with its rows sorted, and the gradients in the order of before.
MapBackwardResult with_sorted_rows(const WeightsBackwardArguments& a) {
  const Tensor order = at::argsort(*a.selected.rows, /*stable=*/true), back = at::argsort(order, /*stable=*/true);
  WeightsBackwardArguments sorted = a;
  const auto sort = [&](Tensor& t, int64_t dim) { t = t.index_select(dim, order); };
  sort(*sorted.selected.rows, 0);
  sort(sorted.grad_weights, -2);
  sort(sorted.query, 2);
  sort(sorted.logsumexp, 2);
  OptionalTensor& mask = sorted.options.attn_mask;
  const bool mask_has_rows = is_defined(mask) && mask->size(2) > 1;
  if (mask_has_rows) sort(*mask, 2);
  MapBackwardResult r = AttentionWeightsBackward::call(sorted);
  if (a.output_mask[kMapQuery]) std::get<kMapQuery>(r) = std::get<kMapQuery>(r).index_select(2, back);
  if (a.output_mask[kMapAttnMask] && mask_has_rows)
    std::get<kMapAttnMask>(r) = std::get<kMapAttnMask>(r).index_select(2, back);
  return r;
}

bool is_sorted(const Tensor& rows) {
  const Tensor numbers = rows.contiguous();
  const int64_t* first = numbers.const_data_ptr<int64_t>();
  return std::is_sorted(first, first + numbers.numel());
}

MapBackwardResult attention_weights_backward_cpu(const WeightsBackwardArguments& a) {
  check_arguments(a);
  if (is_defined(a.selected.rows) && !is_sorted(*a.selected.rows)) return with_sorted_rows(a);
  return run_weights_backward(a, run_backward_kernel);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("attention_statistics_forward", AttentionStatisticsForward::kernel<attention_statistics_forward_cpu>);
  m.impl("attention_statistics_backward", AttentionStatisticsBackward::kernel<attention_statistics_backward_cpu>);
  m.impl("attention_weights_forward", AttentionWeightsForward::kernel<attention_weights_forward_cpu>);
  m.impl("attention_with_weights_forward", AttentionWithWeightsForward::kernel<attention_with_weights_forward_cpu>);
  m.impl("attention_weights_backward", AttentionWeightsBackward::kernel<attention_weights_backward_cpu>);
}

}  // namespace torch_attn::ops
