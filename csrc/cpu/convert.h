// fp16 and bf16 to fp32 and back: exact on the way in, rounded to nearest even on the way out. Subnormals, infinities
// and NaN included. One value at a time here; the array forms take the machine's instructions where it has them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../params.h"

namespace lutgemm {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t value) { return float_from_bits(uint32_t(value) << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return uint16_t((bits >> 16) | 0x40u);  // NaN, made quiet
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t value) {
  const uint32_t sign = uint32_t(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 31u;
  const uint32_t mantissa = value & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24 is exact
    return float_from_bits(bits_from_float(float(mantissa) * 0x1p-24f) | sign);
  }
  if (exponent == 31) {  // infinity and NaN, made quiet
    return float_from_bits(sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
  }
  return float_from_bits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));  // NaN, made quiet
  if (magnitude >= 0x47800000u) return uint16_t(sign | 0x7C00u);                                // 65536 and above
  if (magnitude < 0x38800000u) {  // below 2^-14: 0.5 has ulp 2^-24, so the sum rounds to a multiple of it
    const float shifted = float_from_bits(magnitude) + 0.5f;
    return uint16_t(sign | (bits_from_float(shifted) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);  // a carry may reach infinity, as it should
  return uint16_t(sign | ((rounded - (112u << 23)) >> 13));
}

// Element `index` of an array of fp32, fp16, bf16 or uint8.
inline float load_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return half_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kBFloat16:
      return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case DType::kUInt8:
      return float(static_cast<const uint8_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

inline int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kUInt8:
      return 1;
    default:
      return 2;
  }
}

// src[count] of `dtype` (fp32, fp16, bf16) -> dst[count], exact.
void load_floats(Isa isa, DType dtype, const void* src, int64_t count, float* dst);

// src[count] -> dst[count] of `dtype` (fp32, fp16, bf16), rounded once to nearest even.
void store_floats(Isa isa, DType dtype, const float* src, int64_t count, void* dst);

}  // namespace lutgemm
