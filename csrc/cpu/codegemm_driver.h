// What the CodeGEMM drivers share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "codebook.h"
#include "convert.h"

namespace lutgemm {

// Floats up to the next border of 64 bytes.
inline int64_t aligned(int64_t floats) { return (floats + 15) / 16 * 16; }

// y [passes][row_stride][width] fp32, plus bias, rounded once -> io.y[m0 + .., row0 : row0 + rows].
inline void store_y(const PackedLayout& p, const Io& io, Isa isa, int64_t m0, int width, int passes, int64_t row0,
                    int64_t rows, int64_t row_stride, const float* y) {
  constexpr int64_t kChunk = 512;
  float sums[kChunk], bias[kChunk];
  const int64_t bytes = dtype_bytes(io.dtype);
  const int64_t tokens = std::min<int64_t>(io.M - m0, int64_t(width) * passes);
  for (int64_t r = 0; r < rows; r += kChunk) {
    const int64_t count = std::min(kChunk, rows - r), n = row0 + r;
    if (io.bias != nullptr) load_floats(isa, io.dtype, static_cast<const char*>(io.bias) + n * bytes, count, bias);
    for (int64_t t = 0; t < tokens; ++t) {
      const float* from = y + (t / width * row_stride + r) * width + t % width;
      for (int64_t i = 0; i < count; ++i) sums[i] = from[i * width];
      if (io.bias != nullptr) {
        for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
      }
      store_floats(isa, io.dtype, sums, count, static_cast<char*>(io.y) + ((m0 + t) * p.N + n) * bytes);
    }
  }
}

}  // namespace lutgemm
