// Hard attention's CPU kernels as operators.
#include <cmath>

#include "cpu/selection_kernels.h"
#include "ops/cpu/threads.h"
#include "ops/selection_call.h"

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

struct Kernels {
  explicit Kernels(const Tensor&) {}

  void select(const AttentionProblem& p, const Selection& selection, const SelectionOutputs& outputs) const {
    cpu::select_keys(p, selection, outputs, torch_threads());
  }
  void backward(const AttentionProblem& p, const SelectionBackwardTensors& tensors) const {
    cpu::select_keys_backward(p, tensors, torch_threads());
  }
  void gather(const RowChoice& choice, const TensorView& source, const TensorView& out) const {
    cpu::gather_rows(choice, source, out, torch_threads());
  }
  void scatter(const RowChoice& choice, const TensorView& rows, const TensorView& out) const {
    cpu::scatter_rows(choice, rows, out, torch_threads());
  }
  void dots(const RowChoice& choice, const TensorView& rows, const TensorView& source, void* out) const {
    cpu::chosen_dots(choice, rows, source, out, torch_threads());
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("gather_values", GatherValues::kernel<gather_values_with<Kernels>>);
  m.impl("gather_values_backward", GatherValuesBackward::kernel<gather_values_backward_with<Kernels>>);
  m.impl("select_keys", SelectKeys::kernel<select_keys_with<Kernels>>);
  m.impl("select_keys_backward", SelectKeysBackward::kernel<select_keys_backward_with<Kernels>>);
  m.impl("selection_noise", NoiseOfSelection::kernel<selection_noise_cpu>);
}

}  // namespace torch_attn::ops
