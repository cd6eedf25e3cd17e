// Stands for CUDA's headers when kernels are compiled by g++: keywords, types, indices, barriers, warp collectives.
#pragma once

#include <cassert>
#include <cstdio>

#include "emulation/float16.h"
#include "emulation/intrinsics.h"
#include "emulation/runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define blockDim (::emulation::block_size())
#define gridDim (::emulation::grid_size())
constexpr int warpSize = 32;

using cudaStream_t = void*;

inline void __syncthreads(EMULATION_HERE) { emulation::sync_threads(emulation::Votes::kNone, 0, {file, line}); }
inline int __syncthreads_or(int predicate, EMULATION_HERE) {
  return emulation::sync_threads(emulation::Votes::kAny, predicate, {file, line});
}
inline int __syncthreads_and(int predicate, EMULATION_HERE) {
  return emulation::sync_threads(emulation::Votes::kAll, predicate, {file, line});
}
inline int __syncthreads_count(int predicate, EMULATION_HERE) {
  return emulation::sync_threads(emulation::Votes::kCount, predicate, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_HERE) { emulation::sync_warp(mask, {file, line}); }
inline void __threadfence_block() {}
inline void __threadfence() {}

namespace emulation {

template <typename T>
inline uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "at most 8 bytes");
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof(T));
  return word;
}
template <typename T>
inline T from_word(uint64_t word) {
  T value;
  __builtin_memcpy(&value, &word, sizeof(T));
  return value;
}

__attribute__((const)) inline uint32_t lane() {
  const uint3 thread = thread_index(), size = block_size();
  return (thread.x + size.x * (thread.y + size.y * thread.z)) % 32;
}

}  // namespace emulation

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_HERE) {
  const uint32_t lane = emulation::lane(), first = lane & ~uint32_t(width - 1);
  return emulation::from_word<T>(emulation::shuffle("__shfl_sync", mask, emulation::to_word(value),
                                                    first | (unsigned(source) & unsigned(width - 1)), {file, line}));
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const uint32_t lane = emulation::lane(), first = lane & ~uint32_t(width - 1);
  const uint32_t source = lane >= first + delta ? lane - delta : lane;
  return emulation::from_word<T>(
      emulation::shuffle("__shfl_up_sync", mask, emulation::to_word(value), source, {file, line}));
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_HERE) {
  const uint32_t lane = emulation::lane(), last = lane | uint32_t(width - 1);
  const uint32_t source = lane + delta <= last ? lane + delta : lane;
  return emulation::from_word<T>(
      emulation::shuffle("__shfl_down_sync", mask, emulation::to_word(value), source, {file, line}));
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int xor_mask, int width = 32, EMULATION_HERE) {
  const uint32_t lane = emulation::lane(), last = lane | uint32_t(width - 1);
  const uint32_t source = (lane ^ uint32_t(xor_mask)) <= last ? lane ^ uint32_t(xor_mask) : lane;
  return emulation::from_word<T>(
      emulation::shuffle("__shfl_xor_sync", mask, emulation::to_word(value), source, {file, line}));
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kBallot, "__ballot_sync", mask, predicate != 0, {file, line});
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kBallot, "__any_sync", mask, predicate != 0, {file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kBallot, "__all_sync", mask, predicate == 0, {file, line}) == 0;
}
inline unsigned __match_any_sync(unsigned mask, unsigned value, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kMatch, "__match_any_sync", mask, value, {file, line});
}
// redux.sync: 32-bit integers on sm_80 and later.
inline int __reduce_add_sync(unsigned mask, int value, EMULATION_HERE) {
  return int(emulation::warp_op(emulation::WarpOp::kAdd, "__reduce_add_sync", mask, unsigned(value), {file, line}));
}
inline int __reduce_max_sync(unsigned mask, int value, EMULATION_HERE) {
  return int(emulation::warp_op(emulation::WarpOp::kMax, "__reduce_max_sync", mask, unsigned(value), {file, line}));
}
inline int __reduce_min_sync(unsigned mask, int value, EMULATION_HERE) {
  return int(emulation::warp_op(emulation::WarpOp::kMin, "__reduce_min_sync", mask, unsigned(value), {file, line}));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kAdd, "__reduce_add_sync", mask, value, {file, line});
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kUnsignedMax, "__reduce_max_sync", mask, value, {file, line});
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, EMULATION_HERE) {
  return emulation::warp_op(emulation::WarpOp::kUnsignedMin, "__reduce_min_sync", mask, value, {file, line});
}

// Threads run one at a time between collectives, so the update itself needs no lock; the emulator only has to know that
// it is an atomic one.
#define EMULATION_ATOMIC(name, expression)                                                       \
  template <typename T>                                                                          \
  inline T name(T* address, std::common_type_t<T> value) {                                       \
    const T old = emulation::from_word<T>(emulation::atomic_read(address, sizeof(T)));           \
    emulation::atomic_write(address, sizeof(T), emulation::to_word(static_cast<T>(expression))); \
    return old;                                                                                  \
  }
EMULATION_ATOMIC(atomicAdd, old + value)
EMULATION_ATOMIC(atomicSub, old - value)
EMULATION_ATOMIC(atomicMax, old > value ? old : value)
EMULATION_ATOMIC(atomicMin, old < value ? old : value)
EMULATION_ATOMIC(atomicExch, value)
EMULATION_ATOMIC(atomicAnd, old& value)
EMULATION_ATOMIC(atomicOr, old | value)
EMULATION_ATOMIC(atomicXor, old ^ value)
#undef EMULATION_ATOMIC
template <typename T>
inline T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  const T old = emulation::from_word<T>(emulation::atomic_read(address, sizeof(T)));
  emulation::atomic_write(address, sizeof(T), emulation::to_word<T>(old == compare ? value : old));
  return old;
}
