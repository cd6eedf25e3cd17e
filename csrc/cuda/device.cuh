// What every kernel source includes first: CUDA's types and intrinsics, or their host emulation.
//
// The same .cu file is compiled by nvcc, and (with -DLUTGEMM_EMULATED, flag -Icsrc) by g++ as plain C++17, where
// csrc/emulation/ runs the threads of a block as fibers and checks every memory access. To stay within both worlds:
//
// - 16-bit types carry CUDA's names: __half, __half2, __nv_bfloat16, __nv_bfloat162, with CUDA's intrinsics
//   (__half22float2, __float2half_rn, __floats2half2_rn, __hadd2, __hmul2, __hfma2, __float2bfloat16_rn, ...).
//   csrc/emulation/float16.h lists those that exist.
// - Shared memory is declared by LUTGEMM_SHARED, never by __shared__ itself; all of it is 16-byte aligned:
//       LUTGEMM_SHARED(float, partial, [kWarps][32]);    // static: __shared__ float partial[kWarps][32]
//       LUTGEMM_SHARED(int, flag, );                     // a scalar
//       unsigned char* bytes = dynamic_shared();         // LaunchShape::dynamic_shared bytes, 128-byte aligned
//   Emulated shared memory starts as NaN; reading a byte that nobody wrote is an error, and so is an access outside.
// - All lanes named in a mask run every shuffle, vote, __syncwarp, mma and ldmatrix; all threads of the block run every
//   __syncthreads. Leaving early is an error. Only __syncthreads and __syncwarp order shared memory: a shuffle does
//   not.
// - Vector accesses of 8 and 16 bytes go through load8/load16/store8/store16 of ptx.cuh: a dereferenced uint4* works
//   too, but the emulator sees four 4-byte accesses and counts bank conflicts accordingly.
// - No <<<>>>: launch() of launch.cuh. No asm: ptx.cuh. threadIdx, blockIdx, blockDim and gridDim are as usual.
//   No global-memory atomics are needed; atomicAdd, atomicMax, atomicMin, atomicCAS, atomicExch exist for shared
//   memory.
// - Kernels and helpers in a .cu live in an unnamed namespace: two sources may use the same names.
#pragma once

#include <cstdint>

#if defined(LUTGEMM_EMULATED)

#include "emulation/cuda.h"

// A reference to an array in the emulated block's shared memory; `name##_key` tells arrays (and instances) apart.
#define LUTGEMM_SHARED(type, name, ...) \
  static const char name##_key = 0;     \
  using name##_type = type __VA_ARGS__; \
  name##_type& name =                   \
      *reinterpret_cast<name##_type*>(::emulation::static_shared(&name##_key, sizeof(name##_type), #name))

namespace lutgemm {
inline unsigned char* dynamic_shared() { return ::emulation::dynamic_shared(); }
}  // namespace lutgemm

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LUTGEMM_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__

namespace lutgemm {
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char lutgemm_dynamic_shared[];
  return lutgemm_dynamic_shared;
}
}  // namespace lutgemm

#endif

namespace lutgemm {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;

}  // namespace lutgemm
