// Loading and storing each element type as its accumulator's, and the Math policy that core/'s formulas ask for.
#pragma once

#include "ptx.cuh"

namespace torch_attn::cuda {

TA_DEVICE double load(const double* p) { return *p; }
TA_DEVICE float load(const float* p) { return *p; }
TA_DEVICE float load(const Float16* p) { return ptx::to_float(*p); }
TA_DEVICE float load(const BFloat16* p) { return ptx::to_float(*p); }

TA_DEVICE void store(double* p, double x) { *p = x; }
TA_DEVICE void store(float* p, float x) { *p = x; }
template <class T>
TA_DEVICE void store(T* p, float x) {
  p->bits = static_cast<uint16_t>(ptx::pack(x, x, T{}));
}

// See core/score_mod.h and core/online_softmax.h.
template <class R>
struct Math {
  using Real = R;
  using Value = R;
  TA_DEVICE static R splat(double x) { return static_cast<R>(x); }
  TA_DEVICE static R negative_infinity() { return -static_cast<R>(INFINITY); }
  TA_DEVICE static R abs(R x) { return x < 0 ? -x : x; }
  TA_DEVICE static R select_equal(R a, R b, R if_equal, R otherwise) { return a == b ? if_equal : otherwise; }
  TA_DEVICE static R select_less(R a, R b, R if_less, R otherwise) { return a < b ? if_less : otherwise; }
  TA_DEVICE static R exp(R x);
  TA_DEVICE static R log(R x);
  TA_DEVICE static R tanh(R x);
};
template <>
TA_DEVICE float Math<float>::exp(float x) {
  return expf(x);
}
template <>
TA_DEVICE float Math<float>::log(float x) {
  return logf(x);
}
template <>
TA_DEVICE float Math<float>::tanh(float x) {
  return tanhf(x);
}
template <>
TA_DEVICE double Math<double>::exp(double x) {
  return ::exp(x);
}
template <>
TA_DEVICE double Math<double>::log(double x) {
  return ::log(x);
}
template <>
TA_DEVICE double Math<double>::tanh(double x) {
  return ::tanh(x);
}

constexpr float kLog2E = 1.44269504088896340736f;

// Sixteen bytes of whatever, moved by one instruction.
struct alignas(16) Bits128 {
  uint32_t word[4];
};

TA_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a power of two.
TA_DEVICE int log2_of(int x) {
#if defined(__CUDA_ARCH__)
  return 31 - __clz(x);
#else
  return 31 - __builtin_clz(static_cast<unsigned>(x));
#endif
}

}  // namespace torch_attn::cuda
