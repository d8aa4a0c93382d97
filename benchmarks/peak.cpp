// The machine's limits, measured in the benchmark's own process: fused multiply-adds in registers, and a streaming
// read. Compiled by benchmarks/peak.py with -march=native.
#include <cstdint>

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vec __attribute__((vector_size(kLanes * 4)));

// Floating-point operations that fma_loop(n) performs.
extern "C" double fma_flops(int64_t n) { return 10.0 * kLanes * 2 * n; }

extern "C" float fma_loop(int64_t n) {
  Vec acc[10], b = Vec{} + 0.999f, c = Vec{} + 0.001f;
#pragma GCC unroll 10  // every loop over the array, or it lies in memory
  for (int i = 0; i < 10; ++i) acc[i] = Vec{} + i * 0.1f;
  for (int64_t k = 0; k < n; ++k) {
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) acc[i] = acc[i] * b + c;
#pragma GCC unroll 10
    for (int i = 0; i < 10; ++i) asm volatile("" : "+v"(acc[i]));
  }
  Vec sum = acc[0];
#pragma GCC unroll 10
  for (int i = 1; i < 10; ++i) sum += acc[i];
  return sum[0];
}

extern "C" float stream_read(const float* data, int64_t n) {
  typedef Vec Unaligned __attribute__((aligned(4)));
  Vec sum[8] = {};
  for (int64_t i = 0; i + 8 * kLanes <= n; i += 8 * kLanes)
#pragma GCC unroll 8
    for (int u = 0; u < 8; ++u) sum[u] += *reinterpret_cast<const Unaligned*>(data + i + u * kLanes);
  Vec total = sum[0];
#pragma GCC unroll 8
  for (int u = 1; u < 8; ++u) total += sum[u];
  return total[0];
}
