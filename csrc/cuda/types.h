// Element types of the kernels; plain C++, so that dispatch.cpp can name a kernel's instances without a CUDA header.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/problem.h"

namespace torch_attn::cuda {

// 16-bit floating-point numbers as memory holds them; arithmetic is done in float.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// What sums of products are kept in: double for double, float for all others.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
inline constexpr ScalarType kScalarType = ScalarType::kFloat32;
template <>
inline constexpr ScalarType kScalarType<double> = ScalarType::kFloat64;
template <>
inline constexpr ScalarType kScalarType<Float16> = ScalarType::kFloat16;
template <>
inline constexpr ScalarType kScalarType<BFloat16> = ScalarType::kBFloat16;

}  // namespace torch_attn::cuda
