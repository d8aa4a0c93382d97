// What the kernels of the tensor-core tier ask of a call. Included by tier.cpp and by the files that choose among other
// families of its kernels. Plain C++.
#pragma once

#include <string>

#include "../kernels.h"

namespace torch_attn::cuda::sm80 {

inline bool is_16bit(const AttentionProblem& p) {
  return p.dtype == ScalarType::kFloat16 || p.dtype == ScalarType::kBFloat16;
}
inline int element_bytes(const AttentionProblem& p) { return is_16bit(p) ? 2 : 4; }
inline int piece(const AttentionProblem& p) { return 16 / element_bytes(p); }  // elements of 16 bytes

inline bool is_aligned(const TensorView& view, int piece) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int dimension = 0; dimension < 3; ++dimension) aligned = aligned && view.stride[dimension] % piece == 0;
  return aligned;
}

// Why GPU or dtype rule a call out; empty: they do not.
inline std::string refusal_of_type(const AttentionProblem& p, const DeviceFacts& device) {
  const bool is_float32 = p.dtype == ScalarType::kFloat32;
  if (device.compute_capability < 80) return "it needs compute capability 8.0";
  if (!is_16bit(p) && !is_float32) return "it takes float16, bfloat16 and float32";
  if (is_float32 && !p.allow_tf32)
    return "its float32 products are of TF32, which torch.backends.cuda.matmul.allow_tf32 does not allow";
  return "";
}

}  // namespace torch_attn::cuda::sm80
