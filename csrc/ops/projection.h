// torch_attn::projection, at::linear with a kernel of its own for float32 on AMX (cpu/matrix_product.h), which the
// module projects with. Whatever that kernel does not take is at::linear, with its derivatives and bit by bit; so are
// autocast, compilers, vmap, forward mode and other devices. Included by the layers' files projection.cpp.
#pragma once

#include <ATen/ops/linear.h>

#include <array>
#include <tuple>

#include "ops/operators.h"

namespace torch_attn::ops {

struct ProjectionArguments {
  using Types = TypeList<const Tensor&, const Tensor&, const OptionalTensor&>;

  Tensor input, weight;  // (..., in_features), (out_features, in_features)
  OptionalTensor bias;   // (out_features)

  auto flat() const { return std::tie(input, weight, bias); }
};

struct ProjectionBackwardArguments {
  using Types = TypeList<const Tensor&, const OptionalTensor&, const OptionalTensor&, std::array<bool, 3>>;

  Tensor grad_out;
  OptionalTensor input, weight;  // input for the gradient of weight, and the other way round
  std::array<bool, 3> output_mask;

  auto flat() const { return std::tie(grad_out, input, weight, output_mask); }
};

using ProjectionGradients = std::tuple<Tensor, Tensor, Tensor>;  // of input, weight and bias

struct Projection : Operator<Projection, ProjectionArguments, Tensor> {
  static constexpr const char* name = "torch_attn::projection";
};
struct ProjectionBackward : Operator<ProjectionBackward, ProjectionBackwardArguments, ProjectionGradients> {
  static constexpr const char* name = "torch_attn::projection_backward";
};

// Whether the kernel is there and gains, for plain tensors on the CPU: for no other the operators do anything else than
// at::linear. In cpu/projection.cpp.
bool has_projection_kernel(const ProjectionArguments& a);

namespace composite {

inline Tensor projection(const ProjectionArguments& a) { return at::linear(a.input, a.weight, a.bias); }

// By operators that have derivatives of all kinds.
ProjectionGradients projection_backward(const ProjectionBackwardArguments& a);

}  // namespace composite
}  // namespace torch_attn::ops
