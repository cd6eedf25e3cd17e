// Kernels with a planted fault, present when n is 1 (or as noted), and access patterns of known bank conflicts.
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "driver.h"

namespace lutgemm {
namespace {

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int last_thread() { return static_cast<int>(blockDim.x) - 1; }

// Global memory: n elements from the start are read and written by each thread's own index plus n.
__global__ void global_read(const void* a, const void*, void* y, int n) {
  static_cast<float*>(y)[thread()] = static_cast<const float*>(a)[thread() + n];
}
__global__ void global_write(const void*, const void*, void* y, int n) { static_cast<float*>(y)[thread() + n] = 1.0f; }
__global__ void global_vector_read(const void* a, const void*, void* y, int n) {
  static_cast<uint32_t*>(y)[thread()] = load_stream16(static_cast<const uint32_t*>(a) + 4 * thread() + n).x;
}
__global__ void write_to_input(const void* a, const void*, void*, int n) {
  if (n == 1) static_cast<float*>(const_cast<void*>(a))[thread()] = 1.0f;
}
__global__ void blocks_share_output(const void*, const void*, void* y, int n) {
  static_cast<float*>(y)[n == 1 ? 0 : blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(blockIdx.x);
}

__global__ void shared_read(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(float, table, [32]);
  table[thread()] = 1.0f;
  __syncthreads();
  const float* start = table;
  static_cast<float*>(y)[thread()] = start[thread() + n];
}
__global__ void shared_write(const void*, const void*, void* y, int n) {
  float* table = reinterpret_cast<float*>(dynamic_shared());
  table[thread() + n] = 1.0f;
  static_cast<float*>(y)[thread()] = table[thread() + n];
}
__global__ void uninitialised(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(float, table, [32]);
  if (thread() + 1 != n) table[thread()] = 1.0f;
  __syncthreads();
  static_cast<float*>(y)[thread()] = table[thread()];
}
// Every block starts with fresh shared memory, whatever the one before it left.
__global__ void uninitialised_later_block(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(float, table, [32]);
  if (blockIdx.x == 0 || n == 0) table[thread()] = 1.0f;
  __syncthreads();
  static_cast<float*>(y)[blockIdx.x * blockDim.x + threadIdx.x] = table[thread()];
}

// Threads read what others wrote (and then write what others read).
__global__ void race_block(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, table, [256]);
  table[thread()] = thread();
  if (n != 1) __syncthreads();
  const int value = table[last_thread() - thread()];
  if (n != 2) __syncthreads();
  table[thread()] = value;
  static_cast<int*>(y)[thread()] = table[thread()];
}
__global__ void race_warp(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, table, [64]);
  table[thread()] = thread();
  if (n != 1) __syncwarp();
  const int other = table[thread() ^ 1];
  if (n == 2) __shfl_sync(kFullMask, other, 0);  // brings lanes together, and orders no memory
  if (n != 2) __syncwarp();
  table[thread()] = other;
  // __syncwarp orders nothing between warps.
  if (n == 3) static_cast<int*>(y)[thread()] = table[thread() ^ 32];
  if (n != 3) static_cast<int*>(y)[thread()] = table[thread()];
}
// Written after others have read, with a barrier before both.
__global__ void race_reader(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, table, [64]);
  table[thread()] = thread();
  __syncthreads();
  if (thread() == 0) static_cast<int*>(y)[0] = table[1];
  if (n != 1) __syncthreads();
  if (thread() == 1) table[1] = 3;
}
__global__ void race_readers(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, table, [64]);
  table[thread()] = thread();
  __syncthreads();
  if (thread() >= 32) static_cast<int*>(y)[thread()] = table[40];
  if (n != 1) __syncthreads();
  if (thread() == 0) table[40] = 3;
}
__global__ void race_two_writers(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, table, [64]);
  table[n == 1 ? thread() / 2 : thread()] = 7;
  __syncthreads();
  static_cast<int*>(y)[thread()] = table[thread() / 2];
}
// Neighbours write the two halves of a word: no race.
__global__ void halves_of_a_word(const void*, const void*, void* y, int) {
  LUTGEMM_SHARED(unsigned short, table, [64]);
  table[thread()] = static_cast<unsigned short>(thread());
  __syncthreads();
  static_cast<int*>(y)[thread()] = table[thread() ^ 1];
}
__global__ void race_atomic(const void*, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, count, );
  if (thread() == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  if (n != 1) __syncthreads();
  static_cast<int*>(y)[thread()] = count;
}

__global__ void copy_async(const void* a, const void*, void* y, int n) {
  uint32_t* table = reinterpret_cast<uint32_t*>(dynamic_shared());
  cp_async4(table + thread(), static_cast<const uint32_t*>(a) + thread());
  if (n != 4) cp_async_commit();
  if (n != 1) cp_async_wait<0>();
  if (n != 2) __syncthreads();
  static_cast<uint32_t*>(y)[thread()] = table[n == 3 ? thread() + 1 : last_thread() - thread()];
}

__global__ void divergent_exit(const void*, const void*, void* y, int n) {
  if (n == 1 && thread() == 40) return;
  __syncthreads();
  static_cast<int*>(y)[thread()] = 1;
}
__global__ void divergent_site(const void*, const void*, void* y, int n) {
  if (n == 1 && thread() >= 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  static_cast<int*>(y)[thread()] = 1;
}
__global__ void shuffle_lane_missing(const void*, const void*, void* y, int n) {
  if (n == 1 && thread() == 9) return;
  static_cast<int*>(y)[thread()] = __shfl_xor_sync(kFullMask, thread(), 1);
}
__global__ void shuffle_from_outside(const void*, const void*, void* y, int n) {
  if (thread() % 32 < 16) static_cast<int*>(y)[thread()] = __shfl_sync(0xffffu, thread(), n == 1 ? 20 : 2);
}
__global__ void shuffle_meets_vote(const void*, const void*, void* y, int n) {
  int value = 0;
  if (n == 1 && thread() % 32 == 3) {
    value = __any_sync(kFullMask, 1);
  } else {
    value = __shfl_sync(kFullMask, 1, 0);
    if (n == 0) value += __any_sync(kFullMask, 1);
  }
  static_cast<int*>(y)[thread()] = value;
}

// Real compilers refuse what the emulator refuses at the launch.
#if defined(LUTGEMM_EMULATED)
constexpr int kTooLarge = 48 * 1024;
#else
constexpr int kTooLarge = 48 * 1024 - 32;
#endif
template <int kBytes>
__global__ void static_memory(const void*, const void*, void* y, int) {
  LUTGEMM_SHARED(unsigned char, first, [kBytes]);
  LUTGEMM_SHARED(int, second, );
  if (thread() == 0) first[kBytes - 1] = static_cast<unsigned char>(second = 7);
  __syncthreads();
  static_cast<int*>(y)[thread()] = first[kBytes - 1];
}
__global__ void last_dynamic_byte(const void*, const void*, void* y, int n) {
  dynamic_shared()[n] = 7;
  static_cast<int*>(y)[0] = dynamic_shared()[n];
}

// n: 1 an index outside of an array in registers, 2 a signed overflow, 3 a shift by the width
__global__ void undefined(const void*, const void*, void* y, int n) {
  int values[4] = {1, 2, 3, 4};
  for (int i = 0; i < 4; ++i) values[i] += thread();
  int* out = static_cast<int*>(y) + thread();
  *out = values[(thread() + n) % (n == 1 ? 5 : 4)];
  *out += n == 2 ? 0x7fffffff : 0;
  *out <<= n == 3 ? 29 + n : n;
}

// Launched as dependent: 1: b is read too early, 2: y is written too early, 3: nobody waits.
__global__ void dependent(const void* a, const void* b, void* y, int n) {
  float value = static_cast<const float*>(a)[thread()];
  if (n == 1) value += static_cast<const float*>(b)[0];
  if (n == 2) static_cast<float*>(y)[thread()] = value;
  if (n != 3) grid_dependency_wait();
  launch_dependents();
  value += n == 3 ? 0.0f : static_cast<const float*>(b)[0];
  if (n != 3) static_cast<float*>(y)[thread()] = value;
}

// Loads of a warp at a stride of n words; a line of its own for each width.
__global__ void strided_4(const void*, const void*, void* y, int n) {
  uint32_t* table = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int i = thread(); i < 32 * 32 * 4; i += static_cast<int>(blockDim.x)) table[i] = 1;
  __syncthreads();
  static_cast<uint32_t*>(y)[thread()] = table[thread() * n];
}
__global__ void strided_8(const void*, const void*, void* y, int n) {
  uint32_t* table = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int i = thread(); i < 32 * 32 * 4; i += static_cast<int>(blockDim.x)) table[i] = 1;
  __syncthreads();
  static_cast<uint32_t*>(y)[thread()] = load8(table + thread() * n).x;
}
__global__ void strided_16(const void*, const void*, void* y, int n) {
  uint32_t* table = reinterpret_cast<uint32_t*>(dynamic_shared());
  for (int i = thread(); i < 32 * 32 * 4; i += static_cast<int>(blockDim.x)) table[i] = 1;
  __syncthreads();
  static_cast<uint32_t*>(y)[thread()] = load16(table + thread() * n).x;
}
__global__ void strided_global(const void* a, const void*, void* y, int n) {
  static_cast<uint32_t*>(y)[thread()] = static_cast<const uint32_t*>(a)[thread() * n];
}

}  // namespace
}  // namespace lutgemm

using namespace lutgemm;
LUTGEMM_TEST_KERNELS(run_fault, {"global_read", global_read}, {"global_write", global_write},
                     {"global_vector_read", global_vector_read}, {"write_to_input", write_to_input},
                     {"blocks_share_output", blocks_share_output}, {"shared_read", shared_read},
                     {"shared_write", shared_write}, {"uninitialised", uninitialised},
                     {"uninitialised_later_block", uninitialised_later_block}, {"race_block", race_block},
                     {"race_warp", race_warp}, {"race_reader", race_reader}, {"race_readers", race_readers},
                     {"race_two_writers", race_two_writers}, {"halves_of_a_word", halves_of_a_word},
                     {"race_atomic", race_atomic}, {"copy_async", copy_async}, {"divergent_exit", divergent_exit},
                     {"divergent_site", divergent_site}, {"shuffle_lane_missing", shuffle_lane_missing},
                     {"shuffle_from_outside", shuffle_from_outside}, {"shuffle_meets_vote", shuffle_meets_vote},
                     {"large_static", static_memory<48 * 1024 - 16>}, {"too_large_static", static_memory<kTooLarge>},
                     {"last_dynamic_byte", last_dynamic_byte}, {"undefined", undefined}, {"dependent", dependent},
                     {"strided_4", strided_4}, {"strided_8", strided_8}, {"strided_16", strided_16},
                     {"strided_global", strided_global})
