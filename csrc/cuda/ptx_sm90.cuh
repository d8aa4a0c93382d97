// PTX instructions for kernels whose warps produce and consume in a pipeline: mbarriers and bulk copies, barriers of
// some warps, stores of matrices and atomic sums of four; sm_90. As in ptx.cuh, each is one named function, with a host
// version for the emulator.
//
// An mbarrier is a 64-bit word in shared memory. Its phases are numbered from 0; one completes when all its arrivals
// and all bytes that it was told to expect are in, and the next begins. A wait names the parity of the phase it waits
// for. To arrive is a release, to wait an acquire, of the block (the PTX ISA's defaults of mbarrier.arrive, test_wait
// and try_wait): what a thread wrote or read before it arrived, or others before a __syncwarp with it, happens before
// what those do that have waited for the phase. So plain loads and stores need no other barrier; racecheck, which does
// not follow mbarriers as far, may report them.
#pragma once

#include "ptx.cuh"

#if !defined(__CUDACC__)
#include "emulator/matrix.h"
#include "emulator/mbarrier.h"
#endif

namespace torch_attn::cuda::ptx {

#if defined(__CUDACC__)

// By one thread; then mbarrier_init_fence, and a barrier for those that use it.
TA_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
TA_DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
TA_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// The phase shall also wait for so many bytes of bulk copies.
TA_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Returns once the current phase is not, or no longer, of this parity.
TA_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Whether a wait would return at once.
TA_DEVICE bool mbarrier_test(uint64_t* barrier, int parity) {
  int done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
// A multiple of 16 bytes, aligned to 16, from global to shared memory; the barrier counts them when they are there.
TA_DEVICE void cp_async_bulk(void* destination, const void* source, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// A barrier, 1 … 15, of as many of the block's warps as have `threads`.
TA_DEVICE void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// As one of these warps, which goes on.
TA_DEVICE void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
// Four neighbouring numbers, aligned to 16 bytes, each added to what is there.
TA_DEVICE void add_atomically(float* to, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]), "f"(x[1]), "f"(x[2]),
               "f"(x[3])
               : "memory");
}
// ldmatrix_x4's counterpart.
TA_DEVICE void stmatrix_x4(void* row, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

#else  // the emulator

inline void mbarrier_init(uint64_t* barrier, int arrivals) { emulation::initialise_mbarrier(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulation::arrive_at_mbarrier(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) { emulation::arrive_at_mbarrier(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, int parity) { emulation::wait_for_mbarrier(barrier, parity); }
inline bool mbarrier_test(uint64_t* barrier, int parity) { return emulation::test_mbarrier(barrier, parity); }
inline void cp_async_bulk(void* destination, const void* source, int bytes, uint64_t* barrier) {
  emulation::issue_bulk_copy(destination, source, bytes, barrier);
}
inline void barrier_sync(int barrier, int threads) { emulation::named_barrier(barrier, threads); }
inline void barrier_arrive(int barrier, int threads) { emulation::arrive_at_named_barrier(barrier, threads); }
inline void add_atomically(float* to, const float (&x)[4]) {
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, x[i]);
}
inline void stmatrix_x4(void* row, const uint32_t (&words)[4]) { emulation::store_matrices(row, words); }

#endif

}  // namespace torch_attn::cuda::ptx
