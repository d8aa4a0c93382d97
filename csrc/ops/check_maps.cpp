// The checks of the operators on attention maps; see check.h.
#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <c10/util/Exception.h>

#include "ops/check.h"
#include "ops/map_operators.h"

namespace torch_attn::ops {
namespace {

void check_tensor(const OptionalTensor& tensor, const char* op, const char* name, c10::SymIntArrayRef sizes,
                  at::ScalarType type) {
  if (!is_defined(tensor)) return;
  bool matches = tensor->dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; matches && i < sizes.size(); ++i)
    matches = tensor->sym_size(static_cast<int64_t>(i)).sym_eq(sizes[i]).expect_true(__FILE__, __LINE__);
  TORCH_CHECK(matches, op, ": ", name, " must have shape ", shape_text(sizes), ", but its shape is ",
              shape_text(*tensor), ".");
  TORCH_CHECK(tensor->scalar_type() == type, op, ": ", name, " must be ", c10::getDtypeNames(type).first,
              ", but it is ", c10::getDtypeNames(tensor->scalar_type()).first, ".");
}

void check_wanted(const MapOutputMask& wanted, const ScoreOptions& o, const char* op) {
  const auto check_one = [&](MapGradient gradient, const OptionalTensor& input, const char* name) {
    TORCH_CHECK(!wanted[gradient] || (is_defined(input) && at::isFloatingType(input->scalar_type())), op,
                ": output_mask asks for the gradient of ", name, ", but ", name,
                is_defined(input) ? " is not of a floating dtype." : " is None.");
  };
  check_one(kMapAttnMask, o.attn_mask, "attn_mask");
  check_one(kMapAlibiSlopes, o.alibi_slopes, "alibi_slopes");
  check_one(kMapSinks, o.sinks, "sinks");
}

void check_mass_window(const std::optional<SymInt>& window, const char* op) {
  if (window.has_value())
    TORCH_CHECK_VALUE(window->sym_ge(0).expect_true(__FILE__, __LINE__), op,
                      ": mass_window must be None or an integer of at least 0, but it is ", *window, ".");
}

}  // namespace

void check_arguments(const StatisticsArguments& a) {
  check_arguments(a.forward());
  TORCH_CHECK_VALUE(a.top_k >= 0, "attention_statistics: top_k must be at least 0, but it is ", a.top_k, ".");
  check_mass_window(a.mass_window, "attention_statistics");
}

void check_arguments(const StatisticsBackwardArguments& a) {
  constexpr const char* op = "attention_statistics_backward";
  check_arguments(a.forward());
  check_mass_window(a.mass_window, op);
  const Sizes s = Sizes::of(a.forward());
  const auto accumulator = accumulator_type(a.query.scalar_type());
  const std::array<SymInt, 3> per_row = {s.batch, s.heads, s.query_length}, per_key = {s.batch, s.heads, s.key_length};
  const auto check_row = [&](const OptionalTensor& tensor, const char* name) {
    check_tensor(tensor, op, name, per_row, accumulator);
  };
  check_row(a.logsumexp, "logsumexp");
  check_row(a.grad_logsumexp, "grad_logsumexp");
  check_tensor(a.grad_column_sum, op, "grad_column_sum", per_key, accumulator);

  const auto check_pair = [&](const OptionalTensor& gradient, const OptionalTensor& statistic, const char* name) {
    if (!is_defined(gradient)) return;
    TORCH_CHECK(is_defined(statistic), op, ": grad_", name, " is given, but ", name, " is None.");
  };
  const auto check_statistic = [&](const OptionalTensor& gradient, const OptionalTensor& statistic, const char* name) {
    check_pair(gradient, statistic, name);
    if (!is_defined(gradient)) return;
    check_row(gradient, (std::string("grad_") + name).c_str());
    check_row(statistic, name);
  };
  check_statistic(a.grad_entropy, a.entropy, "entropy");
  check_statistic(a.grad_max_weight, a.max_weight, "max_weight");
  check_statistic(a.grad_mean_distance, a.mean_distance, "mean_distance");
  check_statistic(a.grad_window_mass, a.window_mass, "window_mass");
  TORCH_CHECK(!is_defined(a.grad_window_mass) || a.mass_window.has_value(), op,
              ": grad_window_mass is given, but mass_window is None.");
  if (is_defined(a.grad_max_weight)) {
    TORCH_CHECK(is_defined(a.argmax), op, ": grad_max_weight is given, but argmax is None.");
    check_tensor(a.argmax, op, "argmax", per_row, at::kLong);
  }
  check_pair(a.grad_top_weights, a.top_weights, "top_weights");
  if (is_defined(a.grad_top_weights)) {
    TORCH_CHECK(is_defined(a.top_indices), op, ": grad_top_weights is given, but top_indices is None.");
    TORCH_CHECK(a.top_weights->dim() == 4, op, ": top_weights must have 4 dimensions, but its shape is ",
                shape_text(*a.top_weights), ".");
    const std::array<SymInt, 4> top = {s.batch, s.heads, s.query_length, a.top_weights->sym_size(3)};
    check_tensor(a.top_weights, op, "top_weights", top, accumulator);
    check_tensor(a.grad_top_weights, op, "grad_top_weights", top, accumulator);
    check_tensor(a.top_indices, op, "top_indices", top, at::kLong);
  }
  check_wanted(a.output_mask, a.options, op);
}

void check_arguments(const WeightsArguments& a) {
  constexpr const char* op = "attention_weights";
  check_arguments(a.forward());
  const Sizes s = Sizes::of(a.forward());
  const std::array<SymInt, 3> per_row = {s.batch, s.heads, s.query_length};
  check_tensor(a.logsumexp, op, "logsumexp", per_row, accumulator_type(a.query.scalar_type()));
  check_tensor(a.selected.rows, op, "query_rows", s.query_length, at::kLong);
  TORCH_CHECK(is_defined(a.selected.rows) == a.selected.query_length.has_value(), op,
              ": query_rows and query_length must be given together.");
}

void check_arguments(const WeightsBackwardArguments& a) {
  check_arguments(a.forward());
  const Sizes s = Sizes::of(a.forward().forward());
  const std::vector<SymInt> expected = a.mean ? std::vector<SymInt>{s.batch, s.query_length, s.key_length}
                                              : std::vector<SymInt>{s.batch, s.heads, s.query_length, s.key_length};
  check_tensor(a.grad_weights, "attention_weights_backward", "grad_weights", expected, a.query.scalar_type());
  check_wanted(a.output_mask, a.options, "attention_weights_backward");
}

}  // namespace torch_attn::ops
