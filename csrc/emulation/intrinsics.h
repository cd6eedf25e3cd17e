// CUDA's integer and floating-point intrinsics that need no neighbour thread.
#pragma once

#include <cmath>
#include <cstdint>

#include "emulation/float16.h"

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float __int_as_float(int v) { return emulation::bit_cast<float>(v); }
inline int __float_as_int(float v) { return emulation::bit_cast<int>(v); }
inline float __uint_as_float(unsigned v) { return emulation::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return emulation::bit_cast<unsigned>(v); }
inline long long __double_as_longlong(double v) { return emulation::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return emulation::bit_cast<double>(v); }

namespace emulation {

// Conversions saturate, and turn NaN into 0.
template <typename Integer>
inline Integer saturate(double v) {
  constexpr Integer kLeast = std::is_signed_v<Integer> ? Integer(Integer(1) << (8 * sizeof(Integer) - 1)) : Integer(0);
  if (std::isnan(v)) return 0;
  if (v <= static_cast<double>(kLeast)) return kLeast;
  if (v >= static_cast<double>(Integer(~kLeast))) return Integer(~kLeast);
  return static_cast<Integer>(v);
}

}  // namespace emulation

inline int __float2int_rn(float v) { return emulation::saturate<int>(std::nearbyint(static_cast<double>(v))); }
inline int __float2int_rz(float v) { return emulation::saturate<int>(std::trunc(static_cast<double>(v))); }
inline int __float2int_rd(float v) { return emulation::saturate<int>(std::floor(static_cast<double>(v))); }
inline int __float2int_ru(float v) { return emulation::saturate<int>(std::ceil(static_cast<double>(v))); }
inline unsigned __float2uint_rn(float v) { return emulation::saturate<unsigned>(std::nearbyint(double(v))); }
inline unsigned __float2uint_rz(float v) { return emulation::saturate<unsigned>(std::trunc(double(v))); }
inline long long __float2ll_rn(float v) { return emulation::saturate<long long>(std::nearbyint(double(v))); }
inline float __int2float_rn(int v) { return static_cast<float>(v); }
inline float __uint2float_rn(unsigned v) { return static_cast<float>(v); }
inline float __ll2float_rn(long long v) { return static_cast<float>(v); }

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline unsigned __brev(unsigned v) {
  v = (v >> 1 & 0x55555555u) | (v & 0x55555555u) << 1;
  v = (v >> 2 & 0x33333333u) | (v & 0x33333333u) << 2;
  v = (v >> 4 & 0x0f0f0f0fu) | (v & 0x0f0f0f0fu) << 4;
  return __builtin_bswap32(v);
}
inline unsigned long long __brevll(unsigned long long v) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(v))) << 32 | __brev(unsigned(v >> 32));
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mul24(int a, int b) {
  return static_cast<int>(static_cast<unsigned>((a << 8 >> 8)) * unsigned(b << 8 >> 8));
}

// The PTX instruction prmt; CUDA's __byte_perm is the same without the sign bit of a nibble.
inline uint32_t emulated_prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> 4 * i & 15u;
    uint32_t byte = bytes >> 8 * (nibble & 7u) & 0xffu;
    if (nibble & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { return emulated_prmt(a, b, s & 0x7777u); }

inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}

inline int __dp4a(int a, int b, int c) {
  unsigned sum = static_cast<unsigned>(c);
  for (int i = 0; i < 4; ++i) sum += static_cast<unsigned>(int8_t(a >> 8 * i) * int8_t(b >> 8 * i));
  return static_cast<int>(sum);
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 0xffu) * (b >> 8 * i & 0xffu);
  return c;
}
inline int __dp2a_lo(int a, int b, int c) {
  return static_cast<int>(static_cast<unsigned>(c) + static_cast<unsigned>(int16_t(a) * int8_t(b)) +
                          static_cast<unsigned>(int16_t(a >> 16) * int8_t(b >> 8)));
}
inline int __dp2a_hi(int a, int b, int c) { return __dp2a_lo(a, b >> 16, c); }

// Packed integers: lane by lane, wrapping.
inline unsigned __vadd4(unsigned a, unsigned b) {
  return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}
inline unsigned __vsub4(unsigned a, unsigned b) {
  return ((a | 0x80808080u) - (b & 0x7f7f7f7fu)) ^ ((a ^ ~b) & 0x80808080u);
}
inline unsigned __vadd2(unsigned a, unsigned b) {
  return ((a & 0x7fff7fffu) + (b & 0x7fff7fffu)) ^ ((a ^ b) & 0x80008000u);
}
inline unsigned __vsub2(unsigned a, unsigned b) {
  return ((a | 0x80008000u) - (b & 0x7fff7fffu)) ^ ((a ^ ~b) & 0x80008000u);
}
inline unsigned __vneg2(unsigned a) { return __vsub2(0u, a); }
inline unsigned __vneg4(unsigned a) { return __vsub4(0u, a); }

template <typename T>
inline __attribute__((always_inline)) T __ldg(const T* p) {
  return *p;
}
