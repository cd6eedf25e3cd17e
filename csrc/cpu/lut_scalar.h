// Portable pieces of lut_gemm and biqgemm, as the papers draw them: a table of 256 sums per 8 activations, indexed by
// one byte of codes. Included by *_scalar.cpp only.
#pragma once

#include <cmath>

#include "bcq.h"
#include "convert.h"

namespace lutgemm::scalar {

constexpr int kEntries = 256;
constexpr int kSlices = 4;  // tables of one code word
constexpr int kTableFloats = kSlices * kEntries;

// One group, one row r of a row block, one token: y + its terms.
inline float add_group(const PackedBcq& weight, const uint8_t* group, int64_t words, int64_t r, const float* tables,
                       float sum, float y) {
  const DType dtype = weight.scale_dtype;
  const uint8_t* centers = group + kRowBlock * dtype_bytes(dtype);
  float t = 0.0f;
  if (weight.uniform) {
    t = load_float(centers, DType::kFloat32, r) * sum;
  } else if (weight.has_offsets) {
    t = load_float(group, dtype, weight.bits * kRowBlock + r) * sum;
  }
  for (int b = 0; b < weight.bits; ++b) {
    const uint32_t* codes = weight.codes(group) + b * kRowBlock + r;
    float dot = 0.0f;
    for (int64_t w = 0; w < words; ++w, codes += weight.bits * kRowBlock) {
      const float* table = tables + w * kTableFloats;
      const uint32_t word = *codes;
      dot += table[word & 255];
      dot += table[kEntries + ((word >> 8) & 255)];
      dot += table[2 * kEntries + ((word >> 16) & 255)];
      dot += table[3 * kEntries + (word >> 24)];
    }
    const float scale =
        weight.uniform ? std::ldexp(1.0f, weight.bits - 2 - b) : load_float(group, dtype, b * kRowBlock + r);
    t += scale * dot;
  }
  return weight.uniform ? y + load_float(group, dtype, r) * t : y + t;
}

// Rows of the block that exist; the padding of the last block is not worth computing.
inline int64_t rows_in_block(const PackedBcq& weight, int64_t row_block) {
  const int64_t left = weight.N - row_block * kRowBlock;
  return left < kRowBlock ? left : kRowBlock;
}

}  // namespace lutgemm::scalar
