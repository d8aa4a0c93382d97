// Every PTX instruction that the kernels use, as one named function: inline assembly under nvcc, a host version for the
// emulator. No other file of this folder holds assembly. Names and operands follow the PTX ISA.
#pragma once

#include <cstdint>

#include "device.h"
#include "types.h"

#if !defined(__CUDACC__)
#include "emulator/copies.h"
#include "emulator/matrix.h"
#endif

namespace torch_attn::cuda::ptx {

#if defined(__CUDACC__)

TA_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- conversions

TA_DEVICE float to_float(Float16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}
TA_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// Round to nearest even; low goes into the lower half.
TA_DEVICE uint32_t pack(float low, float high, Float16) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}
TA_DEVICE uint32_t pack(float low, float high, BFloat16) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Round to nearest, ties away from zero, to the 10 bits of a mantissa that mma reads of a TF32 operand.
TA_DEVICE uint32_t to_tf32(float x) {
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return result;
}

// 2 to the power x; about 2 ulp, subnormal results become 0.
TA_DEVICE float ex2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// --- asynchronous copies, sm_80

// 16 bytes from global to shared memory, past the L1 cache; zeros when not valid (source is then not read).
TA_DEVICE void cp_async_16(void* destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(destination)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
TA_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
TA_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// --- matrix instructions, sm_80

// Four 8x8 matrices of 16-bit elements, or 8x4 of 32-bit ones; lane 8m + r gives the address of row r of matrix m.
TA_DEVICE void ldmatrix_x4(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}
TA_DEVICE void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(result[0]), "=r"(result[1]), "=r"(result[2]), "=r"(result[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8, float) += a (16x16) · b (16x8).
TA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
TA_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d (16x8, float) += a (16x8) · b (8x8), all TF32.
TA_DEVICE void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else  // the emulator

inline float to_float(Float16 x) {
  _Float16 value;
  std::memcpy(&value, &x, 2);
  return static_cast<float>(value);
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t round_to_half(float x, Float16) {
  const _Float16 value = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &value, 2);
  return bits;
}
inline uint16_t round_to_half(float x, BFloat16) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7FFF : static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
template <class T>
uint32_t pack(float low, float high, T type) {
  return round_to_half(low, type) | uint32_t{round_to_half(high, type)} << 16;
}

inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFFFFFF;
  return std::isinf(x) ? bits : (bits + 0x1000) & ~0x1FFFu;
}

inline float ex2_approx(float x) {
  const float result = std::exp2(x);
  return result < 1.17549435e-38f ? 0.0f : result;
}

inline void cp_async_16(void* destination, const void* source, bool valid) {
  emulation::issue_copy(destination, source, 16, valid ? 16 : 0);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait() {
  emulation::wait_for_copies(kGroupsLeft);
}

inline void ldmatrix_x4(uint32_t (&result)[4], const void* row) { emulation::load_matrices(result, row, false); }
inline void ldmatrix_x4_trans(uint32_t (&result)[4], const void* row) { emulation::load_matrices(result, row, true); }

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Float16) {
  emulation::multiply_accumulate_16x8x16(emulation::Half::kFloat16, d, a, b0, b1);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, BFloat16) {
  emulation::multiply_accumulate_16x8x16(emulation::Half::kBFloat16, d, a, b0, b1);
}
inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_accumulate_16x8x8(d, a, b0, b1);
}

#endif

}  // namespace torch_attn::cuda::ptx
