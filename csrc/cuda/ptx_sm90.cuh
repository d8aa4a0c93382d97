// PTX instructions of sm_90: mbarriers and bulk copies, for kernels whose warps produce and consume in a pipeline. As
// in ptx.cuh, each is one named function, with a host version for the emulator.
//
// An mbarrier is a 64-bit word in shared memory. Its phases are numbered from 0; one completes when all its arrivals
// and all bytes that it was told to expect are in, and the next begins. A wait names the parity of the phase it waits
// for.
#pragma once

#include "ptx.cuh"

#if !defined(__CUDACC__)
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
// A multiple of 16 bytes, aligned to 16, from global to shared memory; the barrier counts them when they are there.
TA_DEVICE void cp_async_bulk(void* destination, const void* source, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(destination)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

#else  // the emulator

inline void mbarrier_init(uint64_t* barrier, int arrivals) { emulation::initialise_mbarrier(barrier, arrivals); }
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulation::arrive_at_mbarrier(barrier, 0); }
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) { emulation::arrive_at_mbarrier(barrier, bytes); }
inline void mbarrier_wait(uint64_t* barrier, int parity) { emulation::wait_for_mbarrier(barrier, parity); }
inline void cp_async_bulk(void* destination, const void* source, int bytes, uint64_t* barrier) {
  emulation::issue_bulk_copy(destination, source, bytes, barrier);
}

#endif

}  // namespace torch_attn::cuda::ptx
