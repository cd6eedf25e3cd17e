// The emulated bodies of ptx_hopper.cuh, whose first comment describes each: barriers in shared memory and bulk copies
// (mbarrier.cpp), warpgroup products (wgmma.cpp).
#pragma once

#include "emulation/cuda.h"

namespace emulation {

void mbarrier_init(void* barrier, unsigned arrivals, Site site);
void mbarrier_init_fence();
void mbarrier_arrive(void* barrier, unsigned bytes, Site site);
void mbarrier_wait(void* barrier, unsigned parity, Site site);
void bulk_copy(void* shared, const void* global, size_t bytes, void* barrier, Site site);
void fence_async_proxy();

// The address that a matrix descriptor holds; checks all three numbers.
uint32_t descriptor_address(const void* shared, uint32_t leading_bytes, uint32_t stride_bytes);
// d [tokens / 2] is written by the wgmma_wait that ends the product, and must stay where it is until then.
void wgmma(bool bfloat16, unsigned tokens, float* d, const uint32_t* a, uint64_t b, Site site);
void hold_registers(const void* r, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(unsigned groups_left, Site site);

namespace hopper {

__forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals, EMULATION_HERE) {
  emulation::mbarrier_init(barrier, arrivals, {file, line});
}
__forceinline__ void mbarrier_init_fence() { emulation::mbarrier_init_fence(); }
__forceinline__ void mbarrier_arrive(uint64_t* barrier, EMULATION_HERE) {
  emulation::mbarrier_arrive(barrier, 0, {file, line});
}
__forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, EMULATION_HERE) {
  emulation::mbarrier_arrive(barrier, bytes, {file, line});
}
__forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity, EMULATION_HERE) {
  emulation::mbarrier_wait(barrier, parity, {file, line});
}
__forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* barrier, EMULATION_HERE) {
  emulation::bulk_copy(shared, global, bytes, barrier, {file, line});
}
__forceinline__ void bulk_copy_stream(void* shared, const void* global, unsigned bytes, uint64_t* barrier,
                                      EMULATION_HERE) {
  emulation::bulk_copy(shared, global, bytes, barrier, {file, line});
}
__forceinline__ void fence_async_proxy() { emulation::fence_async_proxy(); }

__forceinline__ void wgmma_fence(EMULATION_HERE) { emulation::wgmma_fence({file, line}); }
__forceinline__ void wgmma_commit(EMULATION_HERE) { emulation::wgmma_commit({file, line}); }
template <int kLeft = 0>
__forceinline__ void wgmma_wait(EMULATION_HERE) {
  static_assert(kLeft >= 0 && kLeft <= 7, "0 to 7 groups may be left");
  emulation::wgmma_wait(kLeft, {file, line});
}
template <typename T, int kCount>
__forceinline__ void hold_registers(T (&r)[kCount], EMULATION_HERE) {
  emulation::hold_registers(r, {file, line});
}

constexpr bool wgmma_tokens(int n) {
  return n == 8 || n == 16 || n == 32 || n == 64 || n == 96 || n == 128 || n == 192 || n == 256;
}
template <int kTokens>
__forceinline__ void wgmma_f16(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, EMULATION_HERE) {
  static_assert(wgmma_tokens(kTokens), "ptx_hopper.cuh lists the possible numbers of tokens");
  wgmma(false, kTokens, d, a, b, {file, line});
}
template <int kTokens>
__forceinline__ void wgmma_bf16(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b, EMULATION_HERE) {
  static_assert(wgmma_tokens(kTokens), "ptx_hopper.cuh lists the possible numbers of tokens");
  wgmma(true, kTokens, d, a, b, {file, line});
}

}  // namespace hopper

}  // namespace emulation
