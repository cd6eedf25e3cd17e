// Kernels of ptx_hopper.cuh with a planted fault: n says which, and 0 is the kernel without one.
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "driver.h"

namespace lutgemm {
namespace {

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ bool is_first() { return threadIdx.x == 0; }

__device__ __forceinline__ void new_barrier(uint64_t* barrier, unsigned arrivals) {
  if (is_first()) {
    mbarrier_init(barrier, arrivals);
    mbarrier_init_fence();
  }
  __syncthreads();
}

// The life of a barrier in shared memory with as many arrivals as threads.
__global__ void barrier_life(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(uint64_t, barriers, [66]);
  LUTGEMM_SHARED(int, values, [64]);
  uint64_t* barrier = barriers;
  if (n == 11) barrier = reinterpret_cast<uint64_t*>(static_cast<unsigned char*>(static_cast<void*>(barriers)) + 4);
  if (n == 12) barrier = static_cast<uint64_t*>(y);
  if (is_first() && n != 1) {
    mbarrier_init(barrier, n == 13 ? 0 : blockDim.x);
    if (n == 2) mbarrier_init(barrier, blockDim.x);
    if (n == 14) {
      for (int i = 1; i < 66; ++i) mbarrier_init(barriers + i, 1);
    }
    if (n != 3) mbarrier_init_fence();
  }
  if (n == 4) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  if (n == 5) values[thread()] = static_cast<int>(barriers[0]);
  values[thread()] = thread();
  mbarrier_arrive(barrier);
  if (n == 6) mbarrier_arrive(barrier);
  if (n == 7 && thread() == 40) return;
  if (n != 8) mbarrier_wait(barrier, n == 9 ? 1 : n == 15 ? 2 : 0);
  if (n == 10) mbarrier_wait(barrier, 1);
  static_cast<int*>(y)[thread()] = values[thread() ^ 33];
  if (n == 7) {
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 1);
  }
}

// Only what a thread has done before it arrives is seen by others.
__global__ void arrival_order(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(uint64_t, barrier, );
  new_barrier(&barrier, 1);
  LUTGEMM_SHARED(int, values, [64]);
  if (n == 1 && thread() == 33) values[33] = 1;
  if (thread() == 32) {
    if (n != 2) values[32] = 1;
    mbarrier_arrive(&barrier);
    if (n == 2) values[32] = 1;
  }
  if (n == 3 && is_first()) mbarrier_wait(&barrier, 0);  // and the others of its warp do not
  if (n != 3) mbarrier_wait(&barrier, 0);
  if (n == 4 && thread() < 32) values[32] = 2;
  if (n == 4) __syncwarp();
  static_cast<int*>(y)[thread()] = values[n == 1 ? 33 : 32];
}

// 1 KB from a to shared memory, twice through the same bytes, which all threads read.
__global__ void bulk(const void* a, const void* b, void* y, int n) {
  LUTGEMM_SHARED(uint64_t, full, );
  LUTGEMM_SHARED(uint64_t, empty, );
  unsigned char* shared = dynamic_shared();
  const unsigned bytes = n == 1 ? 1000 : n == 2 ? 0 : 1024;
  if (n == 3) shared += 8;
  if (n == 4) shared += 16;
  if (n == 5) shared = static_cast<unsigned char*>(y);
  const auto* source = static_cast<const unsigned char*>(n == 6 ? b : a) + (n == 7 ? 16 : 0);
  if (is_first()) {
    mbarrier_init(&full, 1);
    mbarrier_init(&empty, blockDim.x);
    if (n != 8) mbarrier_init_fence();
  }
  if (n == 18 || n == 19) shared[thread()] = 1;
  if (n == 19) fence_async_proxy();
  __syncthreads();
  int sum = 0;
  for (int round = 0; round < 2; ++round) {
    if (is_first()) {
      if (n != 9 && round == 1) mbarrier_wait(&empty, 0);
      if (n != 17) mbarrier_arrive_expect(&full, n == 10 ? 512 : n == 11 ? 2048 : n == 20 ? 1 << 20 : 1024);
      bulk_copy(shared, source, bytes, &full);
      if (n == 17 || n == 21) mbarrier_arrive_expect(&full, 1024);
    }
    if (n == 12 && round == 1) break;
    if (n == 13 || n == 14) __syncthreads();
    if ((n == 13 || n == 22) && is_first()) mbarrier_wait(&full, round % 2);
    if (n == 22) __syncthreads();
    if (n != 13 && n != 14 && n != 22) mbarrier_wait(&full, n == 15 ? 0 : round % 2);
    sum += shared[thread()];
    if ((n == 16 || n == 23) && thread() == 5) shared[thread()] = 0;
    if (n == 23) fence_async_proxy();
    mbarrier_arrive(&empty);
  }
  static_cast<int*>(y)[thread()] = sum;
}

// y [64, 16] = A B with A and B of ones, B written by ordinary stores.
__global__ void product(const void*, const void*, void* y, int n) {
  unsigned char* b = dynamic_shared();
  const uint32_t ones = 0x3c003c00u;
  if (!(n == 1 && thread() == 9) && thread() < 32) store16(b + thread() * 16, make_uint4(ones, ones, ones, ones));
  if (n != 2 && n != 3) fence_async_proxy();
  if (n != 4) __syncthreads();
  if (n == 3) fence_async_proxy();
  if (n == 5 && thread() >= 96) return;
  const uint32_t a[4] = {ones, ones, ones, ones};
  float d[8] = {};
  const unsigned step = n == 6 ? 8 : 128;
  const uint64_t descriptor = wgmma_descriptor(b, 2 * step, step) + (n == 7 ? 1 : n == 8 && thread() == 70 ? 8 : 0);
  if (n != 9) wgmma_fence();
  if (n == 22 && thread() == 20) wgmma_commit();
  if (n == 10 && thread() >= 64) {
    wgmma_f16<16>(d, a, descriptor);
  } else {
    wgmma_f16<16>(d, a, descriptor);
  }
  if (n != 11) wgmma_commit();
  if (n == 12 && thread() == 50) d[3] = 1;
  if (n == 13 && thread() == 50) b[511] = 0;
  if (n == 14) static_cast<float*>(y)[thread()] = d[0];
  if (n == 21) hold_registers(d);
  if (n == 15) {
    wgmma_wait<1>();
  } else if (n != 16) {
    wgmma_wait<0>();
  }
  if (n == 17 && thread() == 50) b[511] = 0;
  if (n == 18) wgmma_f16<16>(d, a, descriptor);
  if (n == 19) __syncthreads();
  if (n == 19 && thread() == 50) b[511] = 0;
  if (n == 20 && thread() < 32) b[thread()] = 0;
  if (n != 14) static_cast<float*>(y)[thread()] = d[0] + d[7];
}

}  // namespace
}  // namespace lutgemm

using namespace lutgemm;
LUTGEMM_TEST_KERNELS(run_hopper_fault, {"barrier_life", barrier_life}, {"arrival_order", arrival_order}, {"bulk", bulk},
                     {"product", product})
