// Hard attention's CPU kernels as operators.
#include <ATen/ops/zeros_like.h>

#include <cmath>

#include "core/selection.h"
#include "cpu/selection_kernels.h"
#include "ops/cpu/threads.h"
#include "ops/kernel_call.h"
#include "ops/selection.h"

namespace torch_attn::ops {
namespace {

struct ScalarMath {
  using Real = double;
  using Value = double;
  static double splat(double x) { return x; }
  static double log(double x) { return std::log(x); }
  static double select_equal(double a, double b, double if_equal, double otherwise) {
    return a == b ? if_equal : otherwise;
  }
};

// The noise as numbers, float64. With replacement (B, Hq, L, count, groups, 2): each group's E and uniform number.
// Without, (B, Hq, L, keys): each key's E. A sink counts as a group or a key.
Tensor selection_noise_cpu(const NoiseArguments& a) {
  check_arguments(a);
  AttentionProblem p;
  set_rng_state(p, a.rng_state);
  const SelectionNoise noise{p.philox_seed, p.philox_offset};
  p.heads = a.heads.expect_int();
  const int64_t batch = a.batch.expect_int(), length = a.query_length.expect_int(), keys = a.key_length.expect_int();
  const int64_t groups = SelectionNoise::groups(keys) + a.sink, count = a.replacement ? a.count : 1;
  const auto options = a.rng_state.options().dtype(at::kDouble);
  Tensor result = a.replacement ? at::empty({batch, p.heads, length, count, groups, 2}, options)
                                : at::empty({batch, p.heads, length, keys + a.sink}, options);
  double* out = result.mutable_data_ptr<double>();
  const auto exponential = [](uint32_t word) { return exponential_variate<ScalarMath>(word); };
  for (int64_t row = 0; row < batch * p.heads * length; ++row) {
    const int64_t batch_head = p.dropout_batch_head(row / length / p.heads, row / length % p.heads), i = row % length;
    if (!a.replacement) {
      for (int64_t key = 0; key < keys + a.sink; ++key) {
        const auto words = noise.words(noise.key_counter(batch_head, i, key));
        *out++ = exponential(words.word[key % SelectionNoise::kKeysPerCall]);
      }
      continue;
    }
    for (int64_t sample = 0; sample < count; ++sample) {
      for (int64_t group = 0; group < groups; ++group) {
        const auto words = noise.words(noise.group_counter(batch_head, i, group, sample));
        const uint32_t* word = words.word + 2 * (group % SelectionNoise::kGroupsPerCall);
        *out++ = exponential(word[0]);
        *out++ = (word[1] >> 8) * kUniformUnit<double>;
      }
    }
  }
  return result;
}

SelectionRule rule_of(const SelectArguments& a) {
  if (!a.sample) return SelectionRule::kHighest;
  return a.replacement ? SelectionRule::kWithReplacement : SelectionRule::kWithoutReplacement;
}

SelectResult select_keys_cpu(const SelectArguments& a) {
  check_arguments(a);
  const Tensor rng_state = rng_state_of(a);
  PreparedProblem prepared = make_problem(a.forward(), rng_state);
  AttentionProblem& p = prepared.problem;
  if (a.sample) set_rng_state(p, rng_state);
  const auto integers = a.query.options().dtype(at::kLong);
  const auto reals = a.query.options().dtype(accumulator_type(a.query.scalar_type()));
  const auto per_choice = [&](const at::TensorOptions& options) {
    return at::empty({p.batch, p.heads, p.query_length, a.count}, options);
  };
  const auto per_row = [&] { return at::empty({p.batch, p.heads, p.query_length}, reals); };
  const Tensor indices = per_choice(integers), scores = per_choice(reals), log_prob = per_choice(reals);
  const Tensor entropy = per_row(), logsumexp = per_row();
  if (indices.numel() > 0) {
    const SelectionOutputs outputs{indices.mutable_data_ptr<int64_t>(), scores.mutable_data_ptr(),
                                   log_prob.mutable_data_ptr(), entropy.mutable_data_ptr(),
                                   logsumexp.mutable_data_ptr()};
    cpu::select_keys(p, {rule_of(a), a.count}, outputs, torch_threads());
  }
  return {indices, scores, log_prob, entropy, logsumexp, rng_state};
}

// What each row's logsumexp, its weights' logarithms and its chosen scores receive, of accumulator type.
struct RowGradients {
  Tensor logsumexp, log_weight, chosen;

  explicit RowGradients(const SelectBackwardArguments& a) {
    const Tensor valid = a.indices >= 0;
    logsumexp = is_defined(a.grad_logsumexp) ? *a.grad_logsumexp : at::zeros_like(a.logsumexp);
    if (is_defined(a.grad_log_prob)) {
      chosen = a.grad_log_prob->masked_fill(valid.logical_not(), 0);
      logsumexp = logsumexp - chosen.sum(-1);
    }
    if (is_defined(a.grad_scores)) {
      const Tensor scores = a.grad_scores->masked_fill(valid.logical_not(), 0);
      chosen = chosen.defined() ? chosen + scores : scores;
    }
    if (is_defined(a.grad_entropy)) {  // −Σ P log P passes −P · (log P + entropy) to a score
      log_weight = a.grad_entropy->neg();
      logsumexp = logsumexp + log_weight * a.entropy;
    }
  }

  // The sink is a candidate like any key.
  Tensor of_sinks(const SelectBackwardArguments& a) const {
    const Tensor& sinks = *a.options.sinks;
    const Tensor log_share = sinks.to(a.logsumexp.scalar_type()).unsqueeze(-1) - a.logsumexp;
    const Tensor share = sink_weights(sinks, a.logsumexp);
    Tensor sum = share * logsumexp;
    if (log_weight.defined()) sum = sum + share * log_weight * log_share.masked_fill(share == 0, 0);
    if (chosen.defined()) sum = sum + chosen.masked_fill(a.indices != a.key.size(2), 0).sum(-1);
    return per_head_gradient(sum.sum(2), sinks);
  }
};

SelectBackwardResult dense_backward(const SelectBackwardArguments& a, const RowGradients& rows) {
  const ForwardArguments forward = a.forward();
  const auto contiguous = [](const Tensor& t) { return t.defined() ? t.contiguous() : t; };
  const Tensor indices = a.indices.contiguous(), log_weight = contiguous(rows.log_weight);
  const Tensor chosen = contiguous(rows.chosen);

  const Tensor no_columns = at::empty({a.query.size(0), a.query.size(1), a.query.size(2), 0}, a.query.options());
  BackwardArguments b{no_columns,     rows.logsumexp, forward.query, forward.key,
                      forward.value,  no_columns,     a.logsumexp,   make_rng_state(false, a.query),
                      forward.options};
  for (size_t i = 0; i < kSelectGradients.size(); ++i) b.output_mask[kSelectGradients[i]] = a.output_mask[i];
  b.output_mask[kSinks] = false;
  auto r = run_backward(b, [&](const AttentionProblem& p, const BackwardTensors& tensors) {
    SelectionBackwardTensors t;
    static_cast<BackwardTensors&>(t) = tensors;
    if (log_weight.defined()) t.log_weight_gradient = log_weight.const_data_ptr();
    t.indices = indices.const_data_ptr<int64_t>();
    if (chosen.defined()) t.chosen_gradient = chosen.const_data_ptr();
    t.count = indices.size(3);
    cpu::select_keys_backward(p, t, torch_threads());
  });
  const bool sinks = a.output_mask[kSelectGradients.size() - 1];
  return {std::get<kQuery>(r), std::get<kKey>(r), std::get<kAttnMask>(r), std::get<kAlibiSlopes>(r),
          sinks ? rows.of_sinks(a) : no_gradient(a.query)};
}

// source (B, Hkv, S, D) by indices (B, Hq, R, count).
struct PreparedChoice {
  Tensor indices, weights;
  RowChoice choice;

  PreparedChoice(const Tensor& source, const Tensor& by, const Tensor& weighted)
      : indices(by.contiguous()), weights(weighted.defined() ? weighted.contiguous() : weighted) {
    choice.batch = by.size(0);
    choice.heads = by.size(1);
    choice.kv_heads = source.size(1);
    choice.length = by.size(2);
    choice.count = by.size(3);
    choice.source_length = source.size(2);
    choice.columns = source.size(3);
    choice.indices = indices.const_data_ptr<int64_t>();
    if (weights.defined()) choice.weights = weights.const_data_ptr();
  }
};

Tensor gathered(const Tensor& source, const PreparedChoice& prepared) {
  const RowChoice& c = prepared.choice;
  const Tensor rows = with_unit_column_stride(source);
  Tensor out = empty_by_row(c.batch, c.heads, c.length, c.columns, source.options());
  cpu::gather_rows(c, view_of_matrix(rows), view_of_matrix(out), torch_threads());
  return out;
}

Tensor scattered(const Tensor& rows, const Tensor& like, const PreparedChoice& prepared) {
  const Tensor added = with_unit_column_stride(rows);
  Tensor out = empty_by_row_like(like);
  cpu::scatter_rows(prepared.choice, view_of_matrix(added), view_of_matrix(out), torch_threads());
  return out;
}

Tensor dots_of_chosen(const Tensor& rows, const Tensor& source, const PreparedChoice& prepared) {
  const Tensor left = with_unit_column_stride(rows), right = with_unit_column_stride(source);
  Tensor dots = at::empty(prepared.indices.sizes(), rows.options().dtype(accumulator_type(rows.scalar_type())));
  cpu::chosen_dots(prepared.choice, view_of_matrix(left), view_of_matrix(right), dots.mutable_data_ptr(),
                   torch_threads());
  return dots;
}

Tensor gather_values_cpu(const GatherArguments& a) {
  check_arguments(a);
  return gathered(a.value, PreparedChoice(a.value, a.indices, a.weights.value_or(Tensor())));
}

GatherBackwardResult gather_values_backward_cpu(const GatherBackwardArguments& a) {
  check_arguments(a);
  const PreparedChoice prepared(a.value, a.indices, a.weights.value_or(Tensor()));
  return {a.output_mask[0] ? scattered(a.grad_out, a.value, prepared) : no_gradient(a.value),
          a.output_mask[1] ? dots_of_chosen(a.grad_out, a.value, prepared) : no_gradient(a.value)};
}

// Where nothing but the chosen scores has a gradient, only the chosen keys take part.
bool is_sparse(const SelectBackwardArguments& a) {
  return !is_defined(a.grad_log_prob) && !is_defined(a.grad_entropy) && !is_defined(a.grad_logsumexp) &&
         is_defined(a.grad_scores) && !a.output_mask[2] && !a.output_mask[3];
}

SelectBackwardResult sparse_backward(const SelectBackwardArguments& a, const RowGradients& rows) {
  const AttentionProblem p = make_problem(a.forward(), Tensor()).problem;
  Tensor factor = rows.chosen * p.scale;
  if (p.softcap != 0) {
    const Tensor dots = dots_of_chosen(a.query, a.key, PreparedChoice(a.key, a.indices, Tensor()));
    factor = factor * (1 - (dots * (p.scale / p.softcap)).tanh().square());
  }
  const PreparedChoice prepared(a.key, a.indices, factor);
  return {a.output_mask[0] ? gathered(a.key, prepared) : no_gradient(a.query),
          a.output_mask[1] ? scattered(a.query, a.key, prepared) : no_gradient(a.query), no_gradient(a.query),
          no_gradient(a.query), a.output_mask[4] ? rows.of_sinks(a) : no_gradient(a.query)};
}

SelectBackwardResult select_keys_backward_cpu(const SelectBackwardArguments& a) {
  check_arguments(a);
  const RowGradients rows(a);
  return is_sparse(a) ? sparse_backward(a, rows) : dense_backward(a, rows);
}

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values_cpu>);
  m.impl("gather_values_backward", GatherValuesBackward::kernel<gather_values_backward_cpu>);
  m.impl("select_keys", SelectKeys::kernel<select_keys_cpu>);
  m.impl("select_keys_backward", SelectKeysBackward::kernel<select_keys_backward_cpu>);
  m.impl("selection_noise", NoiseOfSelection::kernel<selection_noise_cpu>);
}

}  // namespace torch_attn::ops
