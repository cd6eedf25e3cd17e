// The emulated bodies of ptx.cuh, whose first comment describes each. Calls are inlined into the kernel, so that every
// use is an access site of its own.
#pragma once

#include "emulation/cuda.h"

namespace emulation::ptx {

template <typename T>
__forceinline__ T load(const void* p) {
  T value;
  read_bytes(&value, p, sizeof(T));
  return value;
}

__forceinline__ uint4 load_stream16(const void* p) { return load<uint4>(p); }
__forceinline__ uint2 load_stream8(const void* p) { return load<uint2>(p); }
__forceinline__ uint32_t load_stream4(const void* p) { return load<uint32_t>(p); }
__forceinline__ void prefetch_l2(const void* p) { emulation::prefetch(p); }
__forceinline__ uint4 load16(const void* p) { return load<uint4>(p); }
__forceinline__ uint2 load8(const void* p) { return load<uint2>(p); }
__forceinline__ void store16(void* p, uint4 v) { write_bytes(p, &v, sizeof(v)); }
__forceinline__ void store8(void* p, uint2 v) { write_bytes(p, &v, sizeof(v)); }

__forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  cp_async(shared, global, 16, valid);
}
__forceinline__ void cp_async16_stream(void* shared, const void* global, bool valid = true) {
  cp_async(shared, global, 16, valid);
}
__forceinline__ void cp_async8(void* shared, const void* global, bool valid = true) {
  cp_async(shared, global, 8, valid);
}
__forceinline__ void cp_async4(void* shared, const void* global, bool valid = true) {
  cp_async(shared, global, 4, valid);
}
__forceinline__ void cp_async_commit() { emulation::cp_async_commit(); }
template <int kLeft = 0>
__forceinline__ void cp_async_wait() {
  emulation::cp_async_wait(kLeft);
}

#define EMULATION_LDMATRIX(count)                                                                         \
  __forceinline__ void ldmatrix_x##count(uint32_t (&r)[count], const void* row, EMULATION_HERE) {         \
    ldmatrix(r, count, false, row, {file, line});                                                         \
  }                                                                                                       \
  __forceinline__ void ldmatrix_x##count##_trans(uint32_t (&r)[count], const void* row, EMULATION_HERE) { \
    ldmatrix(r, count, true, row, {file, line});                                                          \
  }
EMULATION_LDMATRIX(1)
EMULATION_LDMATRIX(2)
EMULATION_LDMATRIX(4)
#undef EMULATION_LDMATRIX

#define EMULATION_MMA(name, type, kind)                                                                    \
  __forceinline__ void name(type(&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATION_HERE) { \
    mma(MmaKind::kind, d, a, b, {file, line});                                                             \
  }
EMULATION_MMA(mma_f16, float, kF16)
EMULATION_MMA(mma_bf16, float, kBF16)
EMULATION_MMA(mma_s8, int, kS8S8)
EMULATION_MMA(mma_u8s8, int, kU8S8)
EMULATION_MMA(mma_s8u8, int, kS8U8)
EMULATION_MMA(mma_u8, int, kU8U8)
#undef EMULATION_MMA

template <int kTable>
__forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(kTable >= 0 && kTable < 256, "a table of 8 bits");
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {  // bit i of the table: the result where (a, b, c) have the bits of i, a's highest
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

__forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) { return emulated_prmt(a, b, selector); }

__forceinline__ void grid_dependency_wait() { emulation::grid_dependency_wait(); }
__forceinline__ void launch_dependents() {}

}  // namespace emulation::ptx
