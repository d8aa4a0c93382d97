// Every wrapper of csrc/cuda/ptx.cuh on one warp and given data. Compiled by nvcc for a GPU and by the emulator's build
// for the CPU; test_conformance.py compares the two with each other and with torch.
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/ptx_sm90.cuh"

namespace torch_attn::cuda {
namespace {

constexpr int kInputWords = 16, kOutputWords = 20, kTf32Words = 8;  // a lane
constexpr int kSharedBytes = 2 * 32 * 16;

template <class T>
__global__ void conformance_kernel(const uint32_t* in, uint32_t* out) {
  TA_DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x;
  const auto bits = [](float x) {
    uint32_t word;
    memcpy(&word, &x, 4);
    return word;
  };
  in += lane * kInputWords;
  out += lane * kOutputWords;

  // 0 … 3: conversions and 2^x.
  const T low{static_cast<uint16_t>(in[0])}, high{static_cast<uint16_t>(in[0] >> 16)};
  const float x = ptx::to_float(low), y = ptx::to_float(high);
  out[0] = bits(x);
  out[1] = bits(y);
  out[2] = ptx::pack(x * 1.0001f, y * 0.9999f, T{});
  out[3] = bits(ptx::ex2_approx(x));

  // 4: a copy, and one that only fills with zeros.
  ptx::cp_async_16(memory + 16 * lane, in, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(memory + 16 * (32 + lane), in, false);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  __syncthreads();
  ptx::cp_async_wait<0>();
  __syncthreads();
  out[4] = reinterpret_cast<const uint32_t*>(memory)[4 * (32 + lane)];

  // 5 … 12: four 8x8 matrices, whose rows lie one after the other.
  uint32_t rows[4], columns[4];
  ptx::ldmatrix_x4(rows, memory + 16 * lane);
  ptx::ldmatrix_x4_trans(columns, memory + 16 * lane);
  for (int i = 0; i < 4; ++i) {
    out[5 + i] = rows[i];
    out[9 + i] = columns[i];
  }

  // 13 … 16: d = a · b + c, with a, b and c straight from the input.
  const uint32_t a[4] = {in[4], in[5], in[6], in[7]};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = ptx::to_float(T{static_cast<uint16_t>(in[10 + i])});
  ptx::mma_m16n8k16(d, a, in[8], in[9], T{});
  for (int i = 0; i < 4; ++i) out[13 + i] = bits(d[i]);

  // 17 … 19: shuffles.
  out[17] = __shfl_xor_sync(~0u, in[0], 5);
  out[18] = __shfl_sync(~0u, in[0], (lane * 7 + 3) % 32);
  out[19] = __shfl_down_sync(~0u, in[0], 3);
}

// In: numbers in float. Out, 0 … 3: the first ones rounded; 4 … 7: a product of the next ones, added to the last.
__global__ void tf32_kernel(const float* in, uint32_t* out) {
  in += threadIdx.x * kInputWords;
  out += threadIdx.x * kTf32Words;
  uint32_t operand[6];
  for (int i = 0; i < 6; ++i) operand[i] = ptx::to_tf32(in[i]);
  for (int i = 0; i < 4; ++i) out[i] = operand[i];
  float d[4] = {in[12], in[13], in[14], in[15]};
  const uint32_t a[4] = {operand[0], operand[1], operand[2], operand[3]};
  ptx::mma_m16n8k8(d, a, operand[4], operand[5]);
  memcpy(out + 4, d, sizeof(d));
}

// A bulk copy of all of `in` into each of two buffers, one after the other: the second is filled once all threads have
// arrived at the barrier that says the first has been read. Out: the first buffer backwards, and the sum of both.
__global__ void mbarrier_kernel(const uint32_t* in, uint32_t* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kWords = 32 * kInputWords, kBytes = 4 * kWords;
  TA_DYNAMIC_SHARED(memory);
  uint32_t* const buffer = reinterpret_cast<uint32_t*>(memory);
  uint64_t* const full = reinterpret_cast<uint64_t*>(memory + 2 * kBytes);
  uint64_t* const empty = full + 1;
  const int thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(empty, 32);
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  for (int step = 0; step < 2; ++step) {
    if (thread == 0) {
      ptx::mbarrier_wait(empty, (step + 1) % 2);
      ptx::mbarrier_arrive_expect_tx(full, kBytes);
      ptx::cp_async_bulk(buffer + step * kWords, in, kBytes, full);
    }
    ptx::mbarrier_wait(full, step % 2);
    for (int i = thread; i < kWords; i += 32) out[i] = step == 0 ? buffer[kWords - 1 - i] : out[i] + buffer[kWords + i];
    ptx::mbarrier_arrive(empty);
  }
#else
  (void)in, (void)out;
#endif
}

// Two warps. Words 0 … 3 of each lane's 16 go through a stored matrix and come back as the lane's row; what the other
// warp stored is added to `out`, atomically, as floats.
__global__ void stores_kernel(const uint32_t* in, float* out) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  TA_DYNAMIC_SHARED(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t words[4] = {in[lane * kInputWords], in[lane * kInputWords + 1], in[lane * kInputWords + 2],
                             in[lane * kInputWords + 3]};
  ptx::stmatrix_x4(memory + 16 * (32 * warp + lane), words);
  ptx::barrier_sync(1, 64);
  const uint32_t* const row = reinterpret_cast<const uint32_t*>(memory + 16 * (32 * (1 - warp) + lane));
  float sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = static_cast<float>(row[i] >> 8);
  ptx::add_atomically(out + 4 * lane, sum);
#else
  (void)in, (void)out;
#endif
}

// Calls run(in, out) with the two buffers where the kernels run. Returns 0, or the CUDA error.
template <class Run>
int with_device_memory(const void* in, size_t in_bytes, void* out, size_t out_bytes, Run&& run) {
#if defined(__CUDACC__)
  void *device_in = nullptr, *device_out = nullptr;
  if (cudaMalloc(&device_in, in_bytes) || cudaMalloc(&device_out, out_bytes)) return cudaGetLastError();
  cudaMemcpy(device_in, in, in_bytes, cudaMemcpyHostToDevice);
  run(device_in, device_out);
  const int error = cudaMemcpy(out, device_out, out_bytes, cudaMemcpyDeviceToHost);
  cudaFree(device_in);
  cudaFree(device_out);
  return error;
#else
  (void)in_bytes, (void)out_bytes;
  run(const_cast<void*>(in), out);
  return 0;
#endif
}

}  // namespace
}  // namespace torch_attn::cuda

// All buffers are in host memory.
extern "C" {

// in: 32 x 16 words of pairs of 16-bit numbers; out: 32 x 20 words.
int run_conformance(bool bfloat16, const uint32_t* in, uint32_t* out) {
  using namespace torch_attn::cuda;
  return with_device_memory(in, 32 * kInputWords * 4, out, 32 * kOutputWords * 4, [&](void* from, void* to) {
    launch(bfloat16 ? conformance_kernel<BFloat16> : conformance_kernel<Float16>, 1, 32, kSharedBytes, Stream{},
           static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to));
  });
}

// in: 32 x 16 words; out: 32 x 4 numbers, zeros before.
int run_stores_conformance(const uint32_t* in, float* out) {
  using namespace torch_attn::cuda;
  return with_device_memory(in, 32 * kInputWords * 4, out, 32 * 4 * 4, [&](void* from, void* to) {
    clear(to, 32 * 4 * 4, Stream{});
    launch(stores_kernel, 1, 64, 2 * 32 * 16, Stream{}, static_cast<const uint32_t*>(from), static_cast<float*>(to));
  });
}

// in: 32 x 16 numbers; out: 32 x 8 words.
int run_tf32_conformance(const float* in, uint32_t* out) {
  using namespace torch_attn::cuda;
  return with_device_memory(in, 32 * kInputWords * 4, out, 32 * kTf32Words * 4, [&](void* from, void* to) {
    launch(tf32_kernel, 1, 32, 0, Stream{}, static_cast<const float*>(from), static_cast<uint32_t*>(to));
  });
}

// in and out: 32 x 16 words. For sm_90 and newer.
int run_mbarrier_conformance(const uint32_t* in, uint32_t* out) {
  using namespace torch_attn::cuda;
  constexpr int kBytes = 32 * kInputWords * 4;
  return with_device_memory(in, kBytes, out, kBytes, [&](void* from, void* to) {
    launch(mbarrier_kernel, 1, 32, 2 * kBytes + 16, Stream{}, static_cast<const uint32_t*>(from),
           static_cast<uint32_t*>(to));
  });
}

}  // extern "C"
