// torch_attn::projection on the CPU: AMX's products of float32 matrices (cpu/matrix_product.h), else at::linear.
#include "ops/projection.h"

#include <ATen/Context.h>
#include <ATen/TensorSubclassLikeUtils.h>

#include <optional>
#include <vector>

#include "cpu/matrix_product.h"
#include "ops/cpu/threads.h"
#include "ops/kernel_call.h"

namespace torch_attn::ops {
namespace {

// A float32 tensor of which nothing but its memory need be known.
bool is_plain(const Tensor& t) {
  return t.device().is_cpu() && t.scalar_type() == at::kFloat && t.layout() == at::kStrided && !t.is_nested() &&
         !t.is_neg() && !t._is_zerotensor() && !at::isTensorSubclassLike(t);
}

// All dimensions but the last as rows of consecutive numbers, so far apart; none: they are not.
std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (last < 1 || (t.stride(last) != 1 && t.size(last) != 1)) return std::nullopt;
  int64_t stride = t.size(last), rows = 1;
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (t.size(dim) == 1) continue;
    if (rows == 1) stride = t.stride(dim);
    if (t.stride(dim) != rows * stride) return std::nullopt;
    rows *= t.size(dim);
  }
  return stride >= t.size(last) ? std::optional(stride) : std::nullopt;
}

// Products of lower precision that at::linear has been allowed are faster than exact ones here.
bool may_round_operands() {
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32 || precision == at::Float32Precision::BF16;
}

cpu::Matrix lines(const Tensor& t, bool along_depth) {
  return {t.const_data_ptr<float>(), *row_stride(t), along_depth};
}

// rows × columns, of the sizes given; undefined where a number is infinite.
Tensor product(at::IntArrayRef sizes, int64_t depth, const cpu::Matrix& left, const cpu::Matrix& right,
               const float* bias, const Tensor& like) {
  Tensor out = new_tensor(sizes, at::kFloat, like);
  const int64_t columns = sizes.back();
  const cpu::MatrixProduct p{out.numel() / columns, columns, depth, left, right, out.mutable_data_ptr<float>(), bias};
  return cpu::matrix_product(p, torch_threads()) ? out : Tensor();
}

std::vector<int64_t> with_last(at::IntArrayRef sizes, int64_t last) {
  std::vector<int64_t> result = sizes.vec();
  result.back() = last;
  return result;
}

Tensor projection_cpu(const ProjectionArguments& a) {
  if (!has_projection_kernel(a)) return composite::projection(a);
  const float* bias = is_defined(a.bias) ? a.bias->const_data_ptr<float>() : nullptr;
  const Tensor out = product(with_last(a.input.sizes(), a.weight.size(0)), a.input.size(-1), lines(a.input, true),
                             lines(a.weight, true), bias, a.input);
  return out.defined() ? out : composite::projection(a);
}

// Whether the gradients that are asked for are products as forward's is.
bool has_gradient_kernel(const ProjectionBackwardArguments& a) {
  const Tensor& g = a.grad_out;
  if (g.dim() < 2 || !is_plain(g) || may_round_operands()) return false;
  const int64_t columns = g.size(-1), rows = columns == 0 ? 0 : g.numel() / columns;
  const auto suits = [&](const OptionalTensor& t, bool is_input) {
    if (!is_defined(t) || t->dim() < 2 || !is_plain(*t) || !row_stride(*t)) return false;
    const bool matches = is_input ? t->sizes().slice(0, t->dim() - 1) == g.sizes().slice(0, g.dim() - 1)
                                  : t->dim() == 2 && t->size(0) == columns;
    return matches && cpu::gains_by_product(rows, columns, t->size(-1));
  };
  return (a.output_mask[0] || a.output_mask[1]) && (!a.output_mask[0] || suits(a.weight, false)) &&
         (!a.output_mask[1] || suits(a.input, true));
}

ProjectionGradients projection_backward_cpu(const ProjectionBackwardArguments& a) {
  if (!has_gradient_kernel(a)) return composite::projection_backward(a);
  const auto& [for_input, for_weight, for_bias] = a.output_mask;
  const Tensor grad_out = row_stride(a.grad_out) ? a.grad_out : a.grad_out.contiguous();
  const int64_t out_features = grad_out.size(-1), rows = grad_out.numel() / out_features;
  Tensor grad_input, grad_weight;
  if (for_input) {
    grad_input = product(with_last(grad_out.sizes(), a.weight->size(1)), out_features, lines(grad_out, true),
                         lines(*a.weight, false), nullptr, grad_out);
  }
  if (for_weight) {
    grad_weight = product({out_features, a.input->size(-1)}, rows, lines(grad_out, false), lines(*a.input, false),
                          nullptr, grad_out);
  }
  // Those that had infinite numbers, and the bias's.
  const auto others = composite::projection_backward(
      {grad_out,
       a.input,
       a.weight,
       {for_input && !grad_input.defined(), for_weight && !grad_weight.defined(), for_bias}});
  return {grad_input.defined() ? grad_input : std::get<0>(others),
          grad_weight.defined() ? grad_weight : std::get<1>(others), std::get<2>(others)};
}

}  // namespace

bool has_projection_kernel(const ProjectionArguments& a) {
  const Tensor &x = a.input, &w = a.weight;
  if (cpu::active_isa() != cpu::Isa::kAmx || !is_plain(x) || !is_plain(w) || x.dim() < 2 || w.dim() != 2) return false;
  if (x.size(-1) != w.size(1) || x.numel() == 0 || may_round_operands()) return false;
  if (!cpu::gains_by_product(x.numel() / x.size(-1), w.size(0), w.size(1)) || !row_stride(x) || !row_stride(w))
    return false;
  return !is_defined(a.bias) ||
         (is_plain(*a.bias) && a.bias->dim() == 1 && a.bias->size(0) == w.size(0) && a.bias->is_contiguous());
}

TORCH_LIBRARY_IMPL(torch_attn, CPU, m) {
  m.impl("projection", Projection::kernel<projection_cpu>);
  m.impl("projection_backward", ProjectionBackward::kernel<projection_backward_cpu>);
}

}  // namespace torch_attn::ops
