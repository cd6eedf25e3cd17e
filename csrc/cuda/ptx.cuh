// The only place with inline PTX, together with ptx_hopper.cuh, which it includes: barriers in shared memory, bulk
// copies and warpgroup products of sm_90a. Every wrapper has a real body (nvcc) and an emulated one
// (csrc/emulation/ptx.h).
//
//   uint4 load_stream16(p), uint2 load_stream8(p), uint32_t load_stream4(p)
//       Global memory that is read once in this kernel and written by nobody while it runs: past L1, first to leave L2.
//       What is loaded before grid_dependency_wait() is issued before it. (ptxas moves ld.global.nc behind that wait,
//       so these are plain loads.)
//   prefetch_l2(p)   brings the line of 128 bytes around p to L2, soon; p must be readable
//   uint4 load16(p), uint2 load8(p), store16(p, uint4), store8(p, uint2)     shared or global, aligned to their size
//   cp_async16(shared, global, valid = true), cp_async8, cp_async4           global -> shared without registers; zeros
//       when not valid (then `global` is not read). cp_async16_stream: as load_stream16.
//   cp_async_commit(), cp_async_wait<kLeft>()   all but the newest kLeft groups *of this thread* have arrived; other
//       threads see them after a following __syncthreads or __syncwarp
//   ldmatrix_x1|x2|x4(uint32_t (&r)[1|2|4], row), ldmatrix_x1|x2|x4_trans
//       8x8 matrices of 16-bit values from shared memory. Lane 8*i + j gives the address of row j (16 bytes, aligned)
//       of matrix i; every lane gives a valid address, also where its row is not used. Lane l receives in r[i] elements
//       [l / 4][2 * (l % 4) .. +1] of matrix i; with _trans those of its transpose.
//   mma_f16(d, a, b), mma_bf16(d, a, b)   float d[4] += A[16, 16] B[16, 8]
//   mma_s8(d, a, b), mma_u8s8, mma_s8u8, mma_u8   int32 d[4] += A[16, 32] B[32, 8] (exact, wraps around)
//       with group = lane / 4, t = lane % 4:
//       d[0..3] = D[group][2t], D[group][2t+1], D[group+8][2t], D[group+8][2t+1]
//       16-bit: a[0] = A[group][2t..2t+1], a[1] = A[group+8][2t..], a[2] = A[group][2t+8..], a[3] = A[group+8][2t+8..]
//               b[0] = B[2t..2t+1][group], b[1] = B[2t+8..2t+9][group]                  (lower k in the lower half)
//       8-bit:  a[0] = A[group][4t..4t+3], a[1] = A[group+8][4t..], a[2] = A[group][4t+16..], a[3] =
//       A[group+8][4t+16..]
//               b[0] = B[4t..4t+3][group], b[1] = B[4t+16..4t+19][group]                (lowest k in the lowest byte)
//       The order in which the hardware adds the products of a float mma is not specified, and its intermediate sums
//       may be truncated; the emulator adds exact products to d in fp32, k ascending.
//   uint32_t lop3<kTable>(a, b, c)   any bitwise function: kTable = f(0xF0, 0xCC, 0xAA)
//   uint32_t prmt(a, b, selector)    byte i of the result = byte (selector nibble i) of b:a; nibble bit 3: its sign
//   grid_dependency_wait(), launch_dependents()   programmatic dependent launch; nothing before sm_90
#pragma once

#include "cuda/device.cuh"

#if defined(LUTGEMM_EMULATED)
#include "emulation/ptx.h"
#endif

namespace lutgemm {

#if defined(LUTGEMM_EMULATED)

using emulation::ptx::cp_async16;
using emulation::ptx::cp_async16_stream;
using emulation::ptx::cp_async4;
using emulation::ptx::cp_async8;
using emulation::ptx::cp_async_commit;
using emulation::ptx::cp_async_wait;
using emulation::ptx::grid_dependency_wait;
using emulation::ptx::launch_dependents;
using emulation::ptx::ldmatrix_x1;
using emulation::ptx::ldmatrix_x1_trans;
using emulation::ptx::ldmatrix_x2;
using emulation::ptx::ldmatrix_x2_trans;
using emulation::ptx::ldmatrix_x4;
using emulation::ptx::ldmatrix_x4_trans;
using emulation::ptx::load16;
using emulation::ptx::load8;
using emulation::ptx::load_stream16;
using emulation::ptx::load_stream4;
using emulation::ptx::load_stream8;
using emulation::ptx::lop3;
using emulation::ptx::mma_bf16;
using emulation::ptx::mma_f16;
using emulation::ptx::mma_s8;
using emulation::ptx::mma_s8u8;
using emulation::ptx::mma_u8;
using emulation::ptx::mma_u8s8;
using emulation::ptx::prefetch_l2;
using emulation::ptx::prmt;
using emulation::ptx::store16;
using emulation::ptx::store8;

#else

#define LUTGEMM_PTX __device__ __forceinline__

// The constant that createpolicy.fractional.L2::evict_first with fraction 1 yields.
constexpr uint64_t kEvictFirst = 0x12F0000000000000ull;

LUTGEMM_PTX uint4 load_stream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p), "l"(kEvictFirst));
  return v;
}

LUTGEMM_PTX uint2 load_stream8(const void* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;"
               : "=r"(v.x), "=r"(v.y)
               : "l"(p), "l"(kEvictFirst));
  return v;
}

LUTGEMM_PTX uint32_t load_stream4(const void* p) {
  uint32_t v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(kEvictFirst));
  return v;
}

LUTGEMM_PTX void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// The compiler sees which memory a pointer is into, and so emits LDS, LDG, STS or STG of the full width.
LUTGEMM_PTX uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
LUTGEMM_PTX uint2 load8(const void* p) { return *static_cast<const uint2*>(p); }
LUTGEMM_PTX void store16(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }
LUTGEMM_PTX void store8(void* p, uint2 v) { *static_cast<uint2*>(p) = v; }

LUTGEMM_PTX uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

LUTGEMM_PTX void cp_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

LUTGEMM_PTX void cp_async16_stream(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0), "l"(kEvictFirst)
               : "memory");
}

LUTGEMM_PTX void cp_async8(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 8 : 0)
               : "memory");
}

LUTGEMM_PTX void cp_async4(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}

LUTGEMM_PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kLeft = 0>
LUTGEMM_PTX void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#define LUTGEMM_LDMATRIX(suffix, qualifier)                                                      \
  LUTGEMM_PTX void ldmatrix_x1##suffix(uint32_t (&r)[1], const void* row) {                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" qualifier ".shared.b16 {%0}, [%1];"             \
                 : "=r"(r[0])                                                                    \
                 : "r"(shared_address(row))                                                      \
                 : "memory");                                                                    \
  }                                                                                              \
  LUTGEMM_PTX void ldmatrix_x2##suffix(uint32_t (&r)[2], const void* row) {                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" qualifier ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                        \
                 : "r"(shared_address(row))                                                      \
                 : "memory");                                                                    \
  }                                                                                              \
  LUTGEMM_PTX void ldmatrix_x4##suffix(uint32_t (&r)[4], const void* row) {                      \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" qualifier ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                \
                 : "r"(shared_address(row))                                                      \
                 : "memory");                                                                    \
  }
LUTGEMM_LDMATRIX(, "")
LUTGEMM_LDMATRIX(_trans, ".trans")
#undef LUTGEMM_LDMATRIX

#define LUTGEMM_MMA(name, type, constraint, instruction)                                                   \
  LUTGEMM_PTX void name(type(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                     \
    asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : constraint(d[0]), constraint(d[1]), constraint(d[2]), constraint(d[3])                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                               \
  }
LUTGEMM_MMA(mma_f16, float, "+f", "m16n8k16.row.col.f32.f16.f16.f32")
LUTGEMM_MMA(mma_bf16, float, "+f", "m16n8k16.row.col.f32.bf16.bf16.f32")
LUTGEMM_MMA(mma_s8, int, "+r", "m16n8k32.row.col.s32.s8.s8.s32")
LUTGEMM_MMA(mma_u8s8, int, "+r", "m16n8k32.row.col.s32.u8.s8.s32")
LUTGEMM_MMA(mma_s8u8, int, "+r", "m16n8k32.row.col.s32.s8.u8.s32")
LUTGEMM_MMA(mma_u8, int, "+r", "m16n8k32.row.col.s32.u8.u8.s32")
#undef LUTGEMM_MMA

template <int kTable>
LUTGEMM_PTX uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

LUTGEMM_PTX uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

LUTGEMM_PTX void grid_dependency_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

LUTGEMM_PTX void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#undef LUTGEMM_PTX

#endif

}  // namespace lutgemm

#include "cuda/ptx_hopper.cuh"
