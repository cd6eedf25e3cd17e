// Wrappers of what only sm_90a has: barriers in shared memory, bulk copies, warpgroup matrix products. Part of ptx.cuh;
// emulated bodies: csrc/emulation/hopper.h. Compiled for any other target they trap: no kernel may reach them there.
//
// Barriers in shared memory (mbarrier). A barrier of n arrivals goes through phases 0, 1, 2, ...; a phase is complete
// when n arrivals, and all bytes that they announced, have come. The next one then begins by itself.
//   mbarrier_init(uint64_t* barrier, arrivals)   by one thread; then mbarrier_init_fence() by it, then __syncthreads
//   mbarrier_init_fence()                        once behind several mbarrier_init
//   mbarrier_arrive(barrier)                     one arrival: releases what this thread did, and what it has acquired
//   mbarrier_arrive_expect(barrier, bytes)       one arrival; the phase also waits for `bytes` of bulk copies
//   mbarrier_wait(barrier, parity)               until the running phase is not of this parity any more; acquires what
//       was released to the phase before, and sees its bulk copies. Phase p has parity p % 2, so that wait(b, p % 2)
//       waits for phase p, and wait(b, 1) of a new barrier returns at once (a ring's producer finds all stages free).
//       A thread may not fall two phases behind.
//   bulk_copy(shared, global, bytes, barrier), bulk_copy_stream(...)   by ONE thread: global -> shared, counted in
//       `barrier`. Addresses and bytes are multiples of 16. _stream: first to leave L2. Only what has waited for the
//       barrier's phase may read the bytes; they may be overwritten so once all who read them have arrived at a barrier
//       that the copying thread has waited for.
//   fence_async_proxy()   by each thread that wrote shared memory (stores or cp.async it has waited for), between that
//       and the barrier behind which wgmma or bulk_copy touch it; and by each that read it by ordinary loads, before a
//       bulk_copy overwrites it. What wgmma alone read, and what a bulk copy brought, need none.
//
// Warpgroup products. A warpgroup is 4 warps, the first a multiple of 4; all 128 threads run each of these together.
//   wgmma_f16<kTokens>(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b), wgmma_bf16
//       D[64, kTokens] += A[64, 16] B[16, kTokens]; kTokens is 8, 16, 32, 64, 96, 128, 192 or 256.
//       Of the thread with group = lane / 4, t = lane % 4, in warp w of the four, with row = 16 * w + group:
//       a[0] = A[row][2t..2t+1], a[1] = A[row+8][2t..], a[2] = A[row][2t+8..], a[3] = A[row+8][2t+8..]
//       d[4i] = D[row][8i+2t], d[4i+1] = D[row][8i+2t+1], d[4i+2] = D[row+8][8i+2t], d[4i+3] = D[row+8][8i+2t+1]
//       (as mma_f16 has them, for 16 rows a warp and 8 tokens an i)
//   wgmma_descriptor(shared, leading_bytes, stride_bytes)   where B lies, K-major without swizzle: in core matrices of
//       8 tokens x 8 values of k, each 128 contiguous bytes, 16 for a token (value k of token n: + 16 * n + 2 * k):
//           B[k][n] at shared + k / 8 * leading_bytes + n / 8 * stride_bytes + n % 8 * 16 + k % 8 * 2
//       leading_bytes steps along K (to the second half of the 16), stride_bytes along tokens. All three are multiples
//       of 16. A step of the address by `bytes` adds bytes / 16 to the descriptor. Core matrices 128 bytes apart in one
//       of the directions are read, and written by 16-byte stores of 8 lanes for 8 tokens, without bank conflicts.
//   wgmma_fence()           before the first product, and whenever registers of a or d were written or read since the
//       last one (products of one shape that add to the same d need none among themselves)
//   wgmma_commit()          ends a group of products
//   wgmma_wait<kLeft>()     until all but the newest kLeft groups of this warp are done. Before that nothing may touch
//       their d (also not by reading it) or write their a, and nobody may overwrite their B; afterwards it may be
//       overwritten once a barrier lies between the waits of all 4 warps and the write.
//   hold_registers(r)       the compiler moves no access to the array r across this, and takes it for a write of r: use
//       it on d before the wgmma_fence() of its first product, and behind the wgmma_wait() that ends its last one;
//       never while a product under way has r.
// ptxas waits for each product before the next, and says so ("wgmma.mma_async instructions are serialized due to ...",
// C7510 and its neighbours), where between a product and its wait it finds a write of its registers, a function call,
// or a branch that the warpgroup may not take as one. With all registers of a loop in arrays of constant indices, d
// untouched from the first product to the wait, and the next a made in another array than that under way, it does not.
#pragma once

#include "cuda/device.cuh"

#if defined(LUTGEMM_EMULATED)
#include "emulation/hopper.h"
#endif

namespace lutgemm {

// The bits of a matrix descriptor: start / 16 in 0..13, leading / 16 in 16..29, stride / 16 in 32..45; base offset
// (49..51) and swizzle (62..63) are 0.
__host__ __device__ __forceinline__ uint64_t wgmma_descriptor_bits(uint32_t address, uint32_t leading,
                                                                   uint32_t stride) {
  constexpr uint32_t kField = 0x3fffu;
  return static_cast<uint64_t>(leading >> 4 & kField) << 16 | static_cast<uint64_t>(stride >> 4 & kField) << 32 |
         (address >> 4 & kField);
}

#if defined(LUTGEMM_EMULATED)

using emulation::hopper::bulk_copy;
using emulation::hopper::bulk_copy_stream;
using emulation::hopper::fence_async_proxy;
using emulation::hopper::hold_registers;
using emulation::hopper::mbarrier_arrive;
using emulation::hopper::mbarrier_arrive_expect;
using emulation::hopper::mbarrier_init;
using emulation::hopper::mbarrier_init_fence;
using emulation::hopper::mbarrier_wait;
using emulation::hopper::wgmma_bf16;
using emulation::hopper::wgmma_commit;
using emulation::hopper::wgmma_f16;
using emulation::hopper::wgmma_fence;
using emulation::hopper::wgmma_wait;

inline uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  return wgmma_descriptor_bits(emulation::descriptor_address(shared, leading_bytes, stride_bytes), leading_bytes,
                               stride_bytes);
}

#else

#define LUTGEMM_PTX __device__ __forceinline__

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LUTGEMM_SM90A(...) asm volatile(__VA_ARGS__)
#else
#define LUTGEMM_SM90A(...) __trap()
#endif

LUTGEMM_PTX void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  LUTGEMM_SM90A("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// The second fence shows the barriers to the copy engine.
LUTGEMM_PTX void mbarrier_init_fence() {
  LUTGEMM_SM90A(
      "fence.mbarrier_init.release.cluster;\n"
      "fence.proxy.async.shared::cta;" :: : "memory");
}

LUTGEMM_PTX void mbarrier_arrive(uint64_t* barrier) {
  LUTGEMM_SM90A("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

LUTGEMM_PTX void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  LUTGEMM_SM90A("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                "r"(bytes) : "memory");
}

// try_wait sleeps for a time that the hardware limits: hence the loop.
LUTGEMM_PTX void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  LUTGEMM_SM90A(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity) : "memory");
}

LUTGEMM_PTX void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  LUTGEMM_SM90A("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                    shared_address(shared)),
                "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

LUTGEMM_PTX void bulk_copy_stream(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  LUTGEMM_SM90A(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(kEvictFirst) : "memory");
}

LUTGEMM_PTX void fence_async_proxy() { LUTGEMM_SM90A("fence.proxy.async.shared::cta;" :: : "memory"); }

LUTGEMM_PTX void wgmma_fence() { LUTGEMM_SM90A("wgmma.fence.sync.aligned;" :: : "memory"); }

LUTGEMM_PTX void wgmma_commit() { LUTGEMM_SM90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }

template <int kLeft = 0>
LUTGEMM_PTX void wgmma_wait() {
  LUTGEMM_SM90A("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

template <int kCount>
LUTGEMM_PTX void hold_registers(float (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(r[i])::"memory");
}

template <int kCount>
LUTGEMM_PTX void hold_registers(uint32_t (&r)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

LUTGEMM_PTX uint64_t wgmma_descriptor(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes) {
  return wgmma_descriptor_bits(shared_address(shared), leading_bytes, stride_bytes);
}

// The operands d[0 .. kTokens / 2) and their names %0, %1, ... in the instruction.
#define LUTGEMM_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LUTGEMM_D8(i) LUTGEMM_D4(i), LUTGEMM_D4(i + 4)
#define LUTGEMM_D16(i) LUTGEMM_D8(i), LUTGEMM_D8(i + 8)
#define LUTGEMM_D32(i) LUTGEMM_D16(i), LUTGEMM_D16(i + 16)
#define LUTGEMM_D64(i) LUTGEMM_D32(i), LUTGEMM_D32(i + 32)
#define LUTGEMM_NAMES5(ten, a, b, c, d, e) "%" #ten #a ", %" #ten #b ", %" #ten #c ", %" #ten #d ", %" #ten #e
#define LUTGEMM_TEN(ten) LUTGEMM_NAMES5(ten, 0, 1, 2, 3, 4) ", " LUTGEMM_NAMES5(ten, 5, 6, 7, 8, 9) ", "
#define LUTGEMM_TO_30 LUTGEMM_TEN() LUTGEMM_TEN(1) LUTGEMM_TEN(2)
#define LUTGEMM_TO_60 LUTGEMM_TO_30 LUTGEMM_TEN(3) LUTGEMM_TEN(4) LUTGEMM_TEN(5)
#define LUTGEMM_TO_90 LUTGEMM_TO_60 LUTGEMM_TEN(6) LUTGEMM_TEN(7) LUTGEMM_TEN(8)
#define LUTGEMM_TO_120 LUTGEMM_TO_90 LUTGEMM_TEN(9) LUTGEMM_TEN(10) LUTGEMM_TEN(11)

// a0 .. a3 and b: which operands are a[0] .. a[3] and the descriptor: those behind d.
#define LUTGEMM_WGMMA_OF(tokens, type, bfloat16, names, a0, a1, a2, a3, b, ...)                                   \
  template <>                                                                                                     \
  LUTGEMM_PTX void wgmma<tokens, bfloat16>(float (&d)[tokens / 2], const uint32_t (&a)[4], uint64_t descriptor) { \
    LUTGEMM_SM90A("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type " {" names                 \
                  "}, "                                                                                           \
                  "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", 1, 1, 1, 0;" : __VA_ARGS__ : "r"(a[0]),     \
                  "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                                              \
  }
#define LUTGEMM_WGMMA(tokens, ...)                    \
  LUTGEMM_WGMMA_OF(tokens, "f16", false, __VA_ARGS__) \
  LUTGEMM_WGMMA_OF(tokens, "bf16", true, __VA_ARGS__)

template <int kTokens, bool kBfloat16>
LUTGEMM_PTX void wgmma(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t descriptor);
LUTGEMM_WGMMA(8, "%0, %1, %2, %3", 4, 5, 6, 7, 8, LUTGEMM_D4(0))
LUTGEMM_WGMMA(16, "%0, %1, %2, %3, %4, %5, %6, %7", 8, 9, 10, 11, 12, LUTGEMM_D8(0))
LUTGEMM_WGMMA(32, LUTGEMM_TEN() LUTGEMM_NAMES5(1, 0, 1, 2, 3, 4) ", %15", 16, 17, 18, 19, 20, LUTGEMM_D16(0))
LUTGEMM_WGMMA(64, LUTGEMM_TO_30 "%30, %31", 32, 33, 34, 35, 36, LUTGEMM_D32(0))
LUTGEMM_WGMMA(96, LUTGEMM_TO_30 LUTGEMM_TEN(3) LUTGEMM_NAMES5(4, 0, 1, 2, 3, 4) ", %45, %46, %47", 48, 49, 50, 51, 52,
              LUTGEMM_D32(0), LUTGEMM_D16(32))
LUTGEMM_WGMMA(128, LUTGEMM_TO_60 "%60, %61, %62, %63", 64, 65, 66, 67, 68, LUTGEMM_D64(0))
LUTGEMM_WGMMA(192, LUTGEMM_TO_90 LUTGEMM_NAMES5(9, 0, 1, 2, 3, 4) ", %95", 96, 97, 98, 99, 100, LUTGEMM_D64(0),
              LUTGEMM_D32(64))
LUTGEMM_WGMMA(256, LUTGEMM_TO_120 LUTGEMM_NAMES5(12, 0, 1, 2, 3, 4) ", %125, %126, %127", 128, 129, 130, 131, 132,
              LUTGEMM_D64(0), LUTGEMM_D64(64))
#undef LUTGEMM_D4
#undef LUTGEMM_D8
#undef LUTGEMM_D16
#undef LUTGEMM_D32
#undef LUTGEMM_D64
#undef LUTGEMM_NAMES5
#undef LUTGEMM_TEN
#undef LUTGEMM_TO_30
#undef LUTGEMM_TO_60
#undef LUTGEMM_TO_90
#undef LUTGEMM_TO_120
#undef LUTGEMM_WGMMA_OF
#undef LUTGEMM_WGMMA

template <int kTokens>
LUTGEMM_PTX void wgmma_f16(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b) {
  wgmma<kTokens, false>(d, a, b);
}

template <int kTokens>
LUTGEMM_PTX void wgmma_bf16(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b) {
  wgmma<kTokens, true>(d, a, b);
}

#undef LUTGEMM_SM90A
#undef LUTGEMM_PTX

#endif

}  // namespace lutgemm
