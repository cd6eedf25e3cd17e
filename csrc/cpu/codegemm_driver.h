// What the CodeGEMM drivers share: a thread's memory, and results to their rows.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "codebook.h"
#include "convert.h"

namespace lutgemm {

// 64-byte aligned floats that a thread keeps between calls: fresh pages would cost as much as a small layer.
class Scratch {
 public:
  float* at_least(int64_t floats) {
    if (floats > size_) {
      const size_t bytes = (size_t(floats) * 4 + 63) / 64 * 64;
      void* fresh = std::aligned_alloc(64, bytes);
      if (fresh == nullptr) throw std::bad_alloc();
      data_.reset(static_cast<float*>(fresh));
      std::memset(fresh, 0, bytes);
      size_ = floats;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  int64_t size_ = 0;
};

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
