// From a call's dtype to the kernels' element type. Included by the files that choose a kernel. Plain C++: no CUDA
// header.
#pragma once

#include <stdexcept>

#include "types.h"

namespace torch_attn::cuda {

template <class T>
struct TypeTag {
  using Type = T;
};

// Calls body(TypeTag<T>) with the element type.
template <class Body>
void with_type(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::kFloat64:
      return body(TypeTag<double>());
    case ScalarType::kFloat32:
      return body(TypeTag<float>());
    case ScalarType::kBFloat16:
      return body(TypeTag<BFloat16>());
    case ScalarType::kFloat16:
      return body(TypeTag<Float16>());
    case ScalarType::kBool:
      break;
  }
  throw std::invalid_argument("attention on CUDA takes float64, float32, bfloat16 and float16");
}

// Scratch memory of so many numbers of accumulator type for each query row.
inline size_t bytes_of_rows(const AttentionProblem& p, size_t numbers) {
  const size_t rows = static_cast<size_t>(p.all_rows());
  return numbers * rows * (p.dtype == ScalarType::kFloat64 ? sizeof(double) : sizeof(float));
}
constexpr size_t kRowStatistics = 3;  // see RowStatistics

}  // namespace torch_attn::cuda
