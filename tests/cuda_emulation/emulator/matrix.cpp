// Which lane holds which element is from the PTX ISA, "Matrix fragments for mma.m16n8k16", "… m16n8k8", "ldmatrix",
// "stmatrix".
#include "matrix.h"

#include <cstring>

#include "collectives.h"
#include "memory.h"

namespace emulation {
namespace {

float decode(Half type, uint32_t bits) {
  if (type == Half::kBFloat16) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}

struct LoadArgument {
  const char* row;
  uint32_t result[4];
};

struct MultiplyArgument {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// d += left · right, for d in the lanes' layout.
template <int kDepth>
void multiply(MultiplyArgument** lanes, const float (&left)[16][kDepth], const float (&right)[kDepth][8]) {
  float sum[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)] = lanes[lane]->d[i];
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < 8; ++n) sum[m][n] += left[m][k] * right[k][n];
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = sum[lane / 4 + 8 * (i >> 1)][2 * (lane % 4) + (i & 1)];
}

void multiply_warp(Half type, MultiplyArgument** lanes) {
  float left[16][16], right[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MultiplyArgument& x = *lanes[lane];
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e) left[group + 8 * (i & 1)][pair + e + 8 * (i >> 1)] = decode(type, x.a[i] >> 16 * e);
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 2; ++e) right[pair + e + 8 * i][group] = decode(type, x.b[i] >> 16 * e);
  }
  multiply(lanes, left, right);
}

float decode_tf32(uint32_t bits) {
  bits &= ~0x1FFFu;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void multiply_warp_tf32(MultiplyArgument** lanes) {
  float left[16][8], right[8][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const MultiplyArgument& x = *lanes[lane];
    const int group = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) left[group + 8 * (i & 1)][t + 4 * (i >> 1)] = decode_tf32(x.a[i]);
    for (int i = 0; i < 2; ++i) right[t + 4 * i][group] = decode_tf32(x.b[i]);
  }
  multiply(lanes, left, right);
}

}  // namespace

void load_matrices(uint32_t (&result)[4], const void* row, bool transpose) {
  LoadArgument argument{static_cast<const char*>(row), {}};
  const char* name = transpose ? "ldmatrix.x4.trans" : "ldmatrix.x4";
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(std::string(name) + ": a row's address is not a multiple of 16");
  if (!is_shared(row)) fail(std::string(name) + ": a row's address is not in shared memory");
  check_read(row, 16, name);
  warp_collective(name, ~0u, argument, [transpose](LoadArgument** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix)
      for (int lane = 0; lane < kWarpSize; ++lane) {
        uint16_t element[2];
        for (int e = 0; e < 2; ++e) {
          const int across = 2 * (lane % 4) + e, along = lane / 4;
          const int r = transpose ? across : along, c = transpose ? along : across;
          std::memcpy(&element[e], lanes[8 * matrix + r]->row + 2 * c, 2);
        }
        lanes[lane]->result[matrix] = element[0] | uint32_t{element[1]} << 16;
      }
  });
  std::memcpy(result, argument.result, sizeof(result));
}

void store_matrices(void* row, const uint32_t (&words)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("stmatrix.x4: a row's address is not a multiple of 16");
  if (!is_shared(row)) fail("stmatrix.x4: a row's address is not in shared memory");
  struct Argument {
    const uint32_t* words;
    uint32_t piece[4];  // the lane's row
  } argument{words, {}};
  warp_collective("stmatrix.x4", ~0u, argument, [](Argument** lanes) {
    for (int lane = 0; lane < kWarpSize; ++lane)
      for (int i = 0; i < 4; ++i) lanes[lane]->piece[i] = lanes[lane % 8 * 4 + i]->words[lane / 8];
  });
  check_write(row, 16, "stmatrix.x4");
  std::memcpy(row, argument.piece, 16);
}

void multiply_accumulate_16x8x16(Half type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyArgument argument{d, a, {b0, b1}};
  warp_collective(type == Half::kFloat16 ? "mma.m16n8k16.f16" : "mma.m16n8k16.bf16", ~0u, argument,
                  [type](MultiplyArgument** lanes) { multiply_warp(type, lanes); });
}

void multiply_accumulate_16x8x8(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MultiplyArgument argument{d, a, {b0, b1}};
  warp_collective("mma.m16n8k8.tf32", ~0u, argument, multiply_warp_tf32);
}

}  // namespace emulation
