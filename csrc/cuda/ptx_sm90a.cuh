// Matrix instructions of a warpgroup, sm_90a: wgmma, in which 128 threads multiply matrices that lie in shared memory
// (the left one may come from registers) while they go on. As in ptx.cuh, each is one named function, with a host
// version for the emulator.
//
// Accumulators are float[n / 8][4] in each thread: of the 16 rows of its warp what mma.m16n8 would hold.
#pragma once

#include "ptx.cuh"

#if !defined(__CUDACC__)
#include "emulator/warpgroup.h"
#endif

namespace torch_attn::cuda::ptx {

#if defined(__CUDACC__)

// 16-bit elements in lines of 128 bytes, whose 16-byte pieces are permuted by the line's number modulo 8 (the "128-byte
// swizzle"); eight lines, 1024 bytes, are a group. A line is one of an operand's rows and 64 elements along which
// products sum up, or, where the operand is transposed, one element along the sum and 64 rows.
struct SharedMatrix {
  uint32_t address, strides;  // a descriptor's halves: registers that hold whole ones for later are spilled

  // group_bytes: from one group to the next. column_bytes: of a transposed operand, from 64 rows to the next 64.
  TA_DEVICE SharedMatrix(const void* start, int group_bytes, int column_bytes)
      : address((shared_address(start) & 0x3FFFF) >> 4 | static_cast<uint32_t>(column_bytes >> 4) << 16),
        strides(static_cast<uint32_t>(group_bytes >> 4) | uint32_t{1} << 30) {}
  TA_DEVICE SharedMatrix after(int bytes) const {
    SharedMatrix moved = *this;
    moved.address += static_cast<uint32_t>(bytes) >> 4;
    return moved;
  }
};

// Of a warpgroup, whose kernel is compiled for a given number of threads in a block: gives registers back, or waits for
// more.
template <int kRegisters, bool kMore>
TA_DEVICE void set_registers() {
  if constexpr (kMore)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  else
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// What this thread wrote to shared memory will be seen by the matrix instructions of whoever passes a barrier after it.
TA_DEVICE void fence_shared_for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first product that uses registers, and after they were written.
TA_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TA_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kGroupsLeft>
TA_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
}
// Keeps the compiler from moving the accumulators' other uses past this point.
template <int kGroups>
TA_DEVICE void hold(float (&d)[kGroups][4]) {
#pragma unroll
  for (int g = 0; g < kGroups; ++g)
    asm volatile("" : "+f"(d[g][0]), "+f"(d[g][1]), "+f"(d[g][2]), "+f"(d[g][3])::"memory");
}

#define TA_ROW(g, F) F(d[g][0]), F(d[g][1]), F(d[g][2]), F(d[g][3])
#define TA_ROWS_4(g, F) TA_ROW(g, F), TA_ROW(g + 1, F), TA_ROW(g + 2, F), TA_ROW(g + 3, F)
#define TA_ROWS_8(F) TA_ROWS_4(0, F), TA_ROWS_4(4, F)
#define TA_ROWS_16(F) TA_ROWS_8(F), TA_ROWS_4(8, F), TA_ROWS_4(12, F)
#define TA_REGISTERS_64                                                                    \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define TA_REGISTERS_128                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "     \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, " \
  "%37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63}, "

// d (64 x N) = [d +] a (64 x 16) · b (16 x N). Rows of a and columns of b are lines, or lines across them where
// transposed.
#define TA_WGMMA(N, GROUPS, TYPE, NAME, A0, A1, B0, B1, D, E)                                                 \
  template <bool kTransposedA = false, bool kTransposedB = false>                                             \
  TA_DEVICE void wgmma(float (&d)[GROUPS][4], const SharedMatrix& a, const SharedMatrix& b, bool add, TYPE) { \
    if (add)                                                                                                  \
      asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%" A0 ", %" A1 "};\nmov.b64 b, {%" B0 ", %" B1            \
                   "};\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " " TA_REGISTERS_##N   \
                   "a, b, 1, 1, 1, %" D ", %" E ";\n}"                                                        \
                   : TA_ROWS_##GROUPS("+f")                                                                   \
                   : "r"(a.address), "r"(a.strides), "r"(b.address), "r"(b.strides), "n"(int{kTransposedA}),  \
                     "n"(int{kTransposedB}));                                                                 \
    else                                                                                                      \
      asm volatile("{\n.reg .b64 a, b;\nmov.b64 a, {%" A0 ", %" A1 "};\nmov.b64 b, {%" B0 ", %" B1            \
                   "};\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " " TA_REGISTERS_##N   \
                   "a, b, 0, 1, 1, %" D ", %" E ";\n}"                                                        \
                   : TA_ROWS_##GROUPS("=f")                                                                   \
                   : "r"(a.address), "r"(a.strides), "r"(b.address), "r"(b.strides), "n"(int{kTransposedA}),  \
                     "n"(int{kTransposedB}));                                                                 \
  }
// d (64 x N) += a (64 x 16, registers as mma.m16n8k16's) · b (16 x N), which is transposed.
#define TA_WGMMA_REGISTERS(N, GROUPS, TYPE, NAME, A0, A1, A2, A3, B0, B1)                                \
  TA_DEVICE void wgmma(float (&d)[GROUPS][4], const uint32_t (&a)[4], const SharedMatrix& b, TYPE) {     \
    asm volatile("{\n.reg .b64 b;\nmov.b64 b, {%" B0 ", %" B1 "};\nwgmma.mma_async.sync.aligned.m64n" #N \
                 "k16.f32." NAME "." NAME " " TA_REGISTERS_##N "{%" A0 ", %" A1 ", %" A2 ", %" A3        \
                                                               "}, b, 1, 1, 1, 1;\n}"                    \
                 : TA_ROWS_##GROUPS("+f")                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.address), "r"(b.strides));          \
  }
TA_WGMMA(64, 8, Float16, "f16", "32", "33", "34", "35", "36", "37")
TA_WGMMA(64, 8, BFloat16, "bf16", "32", "33", "34", "35", "36", "37")
TA_WGMMA(128, 16, Float16, "f16", "64", "65", "66", "67", "68", "69")
TA_WGMMA(128, 16, BFloat16, "bf16", "64", "65", "66", "67", "68", "69")
TA_WGMMA_REGISTERS(64, 8, Float16, "f16", "32", "33", "34", "35", "36", "37")
TA_WGMMA_REGISTERS(64, 8, BFloat16, "bf16", "32", "33", "34", "35", "36", "37")
TA_WGMMA_REGISTERS(128, 16, Float16, "f16", "64", "65", "66", "67", "68", "69")
TA_WGMMA_REGISTERS(128, 16, BFloat16, "bf16", "64", "65", "66", "67", "68", "69")
#undef TA_WGMMA_REGISTERS
#undef TA_WGMMA
#undef TA_REGISTERS_128
#undef TA_REGISTERS_64
#undef TA_ROWS_16
#undef TA_ROWS_8
#undef TA_ROWS_4
#undef TA_ROW

#else  // the emulator

using SharedMatrix = emulation::SharedMatrix;

template <int kRegisters, bool kMore>
void set_registers() {}
inline void fence_shared_for_wgmma() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { emulation::commit_products(); }
template <int kGroupsLeft>
void wgmma_wait() {
  emulation::wait_for_products(kGroupsLeft);
}
template <int kGroups>
void hold(float (&)[kGroups][4]) {}

inline emulation::Half half_of(Float16) { return emulation::Half::kFloat16; }
inline emulation::Half half_of(BFloat16) { return emulation::Half::kBFloat16; }

template <bool kTransposedA = false, bool kTransposedB = false, int kGroups, class T>
void wgmma(float (&d)[kGroups][4], const SharedMatrix& a, const SharedMatrix& b, bool add, T type) {
  emulation::issue_product(half_of(type), d, kGroups, a, kTransposedA, b, kTransposedB, add);
}
template <int kGroups, class T>
void wgmma(float (&d)[kGroups][4], const uint32_t (&a)[4], const SharedMatrix& b, T type) {
  emulation::issue_product(half_of(type), d, kGroups, a, b);
}

#endif

}  // namespace torch_attn::cuda::ptx
