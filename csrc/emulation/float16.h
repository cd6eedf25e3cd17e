// __half and __nv_bfloat16 with CUDA's names: storage of 16 bits, every operation rounded once, to nearest even.
//
// Sums, differences, products, quotients and square roots of two such numbers may go through fp32: its 24 bits are at
// least 2 * 11 + 2, which makes the second rounding harmless. An fma is formed in fp64 and rounded to odd on the way.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation/vector_types.h"

namespace emulation {

template <typename To, typename From>
inline To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

inline uint16_t half_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                                  // CUDA's only NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: the sum with 0.5 has the subnormals' spacing of 2^-24
    return static_cast<uint16_t>(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u));
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u) >> 13);
}

inline float half_value(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(mantissa) * 0x1p-24f));
  return bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | mantissa << 13);
}

inline uint16_t bfloat16_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float bfloat16_value(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// a * b + c as a float rounded to odd, so that rounding it again to 16 bits gives the correctly rounded result.
inline float fma_to_odd(float a, float b, float c) {
  const double product = static_cast<double>(a) * b;  // exact: at most 22 bits
  const double sum = product + c;
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  const double part = sum - product, lost = (product - (sum - part)) + (c - part);
  const float rounded = static_cast<float>(sum);
  if (std::isinf(rounded)) return rounded;
  const double rest = (sum - rounded) + lost;  // only its sign matters
  const uint32_t bits = bit_cast<uint32_t>(rounded);
  if (rest == 0 || (bits & 1u)) return rounded;
  return std::nextafter(rounded, rest > 0 ? INFINITY : -INFINITY);
}

}  // namespace emulation

struct __half_raw {
  uint16_t x;
};
struct __nv_bfloat16_raw {
  uint16_t x;
};

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(emulation::half_bits(value)) {}
  __half(__half_raw raw) : bits(raw.x) {}
  operator float() const { return emulation::half_value(bits); }
};

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(emulation::bfloat16_bits(value)) {}
  __nv_bfloat16(__nv_bfloat16_raw raw) : bits(raw.x) {}
  operator float() const { return emulation::bfloat16_value(bits); }
};

struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

namespace emulation {

template <typename T>
using If16 = std::enable_if_t<std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>, T>;
template <typename T>
using IfPair = std::enable_if_t<std::is_same_v<T, __half2> || std::is_same_v<T, __nv_bfloat162>, T>;

}  // namespace emulation

// One number.
inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline float __half2float(__half v) { return v; }
inline __half __int2half_rn(int v) { return __half(static_cast<float>(v)); }
inline int __half2int_rn(__half v) { return static_cast<int>(std::nearbyint(static_cast<float>(v))); }
inline __half __short2half_rn(short v) { return __half(static_cast<float>(v)); }
inline __half __ushort_as_half(unsigned short v) { return __half(__half_raw{v}); }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline __half __short_as_half(short v) { return __half(__half_raw{static_cast<uint16_t>(v)}); }
inline short __half_as_short(__half v) { return static_cast<short>(v.bits); }
inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return __nv_bfloat16(__nv_bfloat16_raw{v}); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.bits; }

#define EMULATION_BINARY(name, expression)                 \
  template <typename T>                                    \
  inline emulation::If16<T> __h##name(T first, T second) { \
    const float a = first, b = second;                     \
    return T(expression);                                  \
  }                                                        \
  template <typename T>                                    \
  inline emulation::IfPair<T> __h##name##2(T a, T b) {     \
    return {__h##name(a.x, b.x), __h##name(a.y, b.y)};     \
  }
EMULATION_BINARY(add, a + b)
EMULATION_BINARY(sub, a - b)
EMULATION_BINARY(mul, a* b)
EMULATION_BINARY(div, a / b)
EMULATION_BINARY(max, std::fmax(a, b))
EMULATION_BINARY(min, std::fmin(a, b))
#undef EMULATION_BINARY

template <typename T>
inline emulation::If16<T> __hfma(T a, T b, T c) {
  return T(emulation::fma_to_odd(a, b, c));
}
template <typename T>
inline emulation::IfPair<T> __hfma2(T a, T b, T c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <typename T>
inline emulation::If16<T> __hneg(T a) {
  a.bits ^= 0x8000u;
  return a;
}
template <typename T>
inline emulation::IfPair<T> __hneg2(T a) {
  return {__hneg(a.x), __hneg(a.y)};
}
template <typename T>
inline emulation::If16<T> __habs(T a) {
  a.bits &= 0x7fffu;
  return a;
}
template <typename T>
inline emulation::IfPair<T> __habs2(T a) {
  return {__habs(a.x), __habs(a.y)};
}

#define EMULATION_OPERATOR(symbol, name)                  \
  template <typename T>                                   \
  inline emulation::If16<T> operator symbol(T a, T b) {   \
    return __h##name(a, b);                               \
  }                                                       \
  template <typename T>                                   \
  inline emulation::IfPair<T> operator symbol(T a, T b) { \
    return __h##name##2(a, b);                            \
  }
EMULATION_OPERATOR(+, add)
EMULATION_OPERATOR(-, sub)
EMULATION_OPERATOR(*, mul)
EMULATION_OPERATOR(/, div)
#undef EMULATION_OPERATOR

// Pairs: x is the lower half of the 32-bit word.
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float2half2_rn(float v) { return {__half(v), __half(v)}; }
inline __half2 __half2half2(__half v) { return {v, v}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 make_half2(__half x, __half y) { return {x, y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __lowhigh2highlow(__half2 v) { return {v.y, v.x}; }
inline __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
inline __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float2bfloat162_rn(float v) { return {__nv_bfloat16(v), __nv_bfloat16(v)}; }
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 v) { return {v, v}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat162 make_bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline __nv_bfloat162 __low2bfloat162(__nv_bfloat162 v) { return {v.x, v.x}; }
inline __nv_bfloat162 __high2bfloat162(__nv_bfloat162 v) { return {v.y, v.y}; }
inline float __low2float(__nv_bfloat162 v) { return v.x; }
inline float __high2float(__nv_bfloat162 v) { return v.y; }
