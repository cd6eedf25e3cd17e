// The accuracy "fast" of tile_gemm.h: a tile of 8-bit integers, activations of 8 bits with a step for every 32 k.
//
//   vgf2p8affineqb  bits of 4 k of each matrix of 2 rows (tile_decode_vbmi.h): 4 bits for each of 16 rows and 4 k
//   uniform         these are the integer. free: vpermb looks 2 planes up in 16 rows' tables of 4 levels
//   vpdpbusd        16 rows: sum += the products of 4 k
#include "isa.h"
#if LUTGEMM_X86
#include <cmath>
#include <limits>

#include "byte_kernels.h"
#include "byte_scales_avx512.h"
#include "tile_gemm.h"

LUTGEMM_TARGET_AVX512VBMI_BEGIN
#include "tile_decode_vbmi.h"

namespace lutgemm::vbmi {
namespace {

// Bits of 4 k of each row: of even rows in bits 4 to 7 of each byte, of odd ones in bits 0 to 3, the first plane
// highest; the other 4 bits are the neighbour's.
inline __m512i four_k(__m512i matrices, int half) {
  const __m512i select = _mm512_set1_epi32(half ? int(0x8040'2010u) : 0x0804'0201);
  return _mm512_gf2p8affine_epi64_epi8(select, matrices, 0);
}

// The integers of 16 rows and 4 k, shifted up to 4 or 8 bits.
template <int kHigh, int kLow>
struct Uniform {
  static constexpr int kParts = 2, kMost = kMostUniform, kZero = 0;

  Uniform(const TileTask&, int, const float*) {}
  __m512i operator()(__m512i high, __m512i low, int half) const {
    const __m512i nibble = _mm512_set1_epi8(0x0F);
    const __m512i u = four_k(high, half);
    if (kLow == 0) return _mm512_and_si512(_mm512_srlv_epi32(u, by_row(4, 0)), nibble);
    const __m512i below = _mm512_srlv_epi32(four_k(low, half), by_row(4, 0));
    return _mm512_ternarylogic_epi64(_mm512_sllv_epi32(u, by_row(0, 4)), below, nibble, 0xD8);  // c ? b : a
  }
};

// Levels of two planes of 16 rows, bytes: entry (row << 2) + (2 bit of the first + bit of the second).
struct Levels {
  __m512i entries;

  // base: added to each level.
  Levels(const FreeRow& row, int pair, __m512 base) {
    __m512i level[4];
    row.levels(pair, base, level);
    const __m512i byte = _mm512_set1_epi32(0xFF);
    entries = _mm512_and_si512(level[0], byte);
    for (int i = 1; i < 4; ++i) {
      entries = _mm512_or_si512(entries, _mm512_slli_epi32(_mm512_and_si512(level[i], byte), unsigned(8 * i)));
    }
  }
  Levels() = default;

  __m512i operator()(__m512i code) const {
    const __m512i row = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(0x0404'0404));
    const __m512i index = _mm512_ternarylogic_epi64(row, code, _mm512_set1_epi8(3), 0xF8);  // a | (b & c)
    return _mm512_permutexvar_epi8(index, entries);
  }
};

// 16 rows and 4 k: 128 + the sum over planes, two at a time, each rounded to the row's unit.
template <int kHigh, int kLow>
struct Free {
  static constexpr int kParts = 2, kMost = 127, kZero = 128, kLookUps = (kHigh + kLow + 1) / 2;
  Levels levels[kLookUps];

  Free(const TileTask& task, int r, const float* units) {
    const FreeRow row(task, r, units);
    const __m512 zero = _mm512_set1_ps(float(kZero));
    for (int p = 0; p < kLookUps; ++p) {
      levels[p] = Levels(row, p, p == 0 ? _mm512_add_ps(zero, row.offset()) : _mm512_setzero_ps());
    }
  }
  __m512i operator()(__m512i high, __m512i low, int half) const {
    __m512i u = four_k(high, half);
    __m512i w = levels[0](_mm512_srlv_epi32(u, by_row(6, 2)));
    if constexpr (kHigh > 2) w = _mm512_add_epi8(w, levels[1](_mm512_srlv_epi32(u, by_row(4, 0))));
    if constexpr (kLow > 0) {
      u = four_k(low, half);
      w = _mm512_add_epi8(w, levels[2](_mm512_srlv_epi32(u, by_row(6, 2))));
    }
    if constexpr (kLow > 2) w = _mm512_add_epi8(w, levels[3](_mm512_srlv_epi32(u, by_row(4, 0))));
    return w;
  }
};

constexpr int64_t kStepQuads = kFastFeatures / 4;

template <int kTokens>
void multiply(const TileTask& task, const Tile& tile, int64_t first, Prefetch& prefetch) {
  __m512 total[kTokens][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kTokens * kVectors; ++i) total[i / kVectors][i % kVectors] = _mm512_setzero_ps();
  const auto* q = static_cast<const int8_t*>(task.q) + first * kTileFeatures;
  const float* steps = task.steps + first * kFastSteps;
  const int32_t* w = tile.w[0];
  for (int64_t left = task.slices * 2; left > 0; left -= kStepQuads, ++steps) {
    __m512i sum[kTokens][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kTokens * kVectors; ++i) sum[i / kVectors][i % kVectors] = _mm512_setzero_si512();
    const int8_t* end = q + 4 * (left < kStepQuads ? left : kStepQuads);
    for (; q < end; q += 4, w += kByteRows) {
      prefetch.next();
      __m512i x[kTokens];
#pragma GCC unroll 2
      for (int m = 0; m < kTokens; ++m) {
        int32_t four;
        __builtin_memcpy(&four, q + m * kTileFeatures, sizeof four);
        x[m] = _mm512_set1_epi32(four);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        __m512i rows = _mm512_load_si512(w + r * kLanes);
        asm volatile("" : "+v"(rows));  // GCC would load it once for each token
#pragma GCC unroll 2
        for (int m = 0; m < kTokens; ++m) sum[m][r] = _mm512_dpbusd_epi32(sum[m][r], rows, x[m]);
      }
    }
#pragma GCC unroll 2
    for (int m = 0; m < kTokens; ++m) {
      const __m512 step = _mm512_set1_ps(steps[m * kFastSteps]);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        total[m][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[m][r]), step, total[m][r]);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < kTokens; ++m) {
    const __m512 all = _mm512_set1_ps(task.sums[first + m]);
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) {
      float* y = task.y + (first + m) * kByteRows + r * kLanes;
      const __m512 v = _mm512_fnmadd_ps(_mm512_load_ps(tile.zero + r * kLanes), all, total[m][r]);
      _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_load_ps(tile.unit + r * kLanes), v, _mm512_loadu_ps(y)));
    }
  }
}

}  // namespace

void round_to_bytes(bool, const float* x, void* q, float* steps, float* sum) {
  auto* out = static_cast<int8_t*>(q);
  *sum = 0.0f;
  for (int64_t s = 0; s < kFastSteps; ++s, x += kFastFeatures, out += kFastFeatures) {
    const __m512 a = _mm512_load_ps(x), b = _mm512_load_ps(x + kLanes);
    const __m512 size_a = _mm512_abs_ps(a), size_b = _mm512_abs_ps(b);
    const float total = _mm512_reduce_add_ps(_mm512_add_ps(size_a, size_b));
    const float most = _mm512_reduce_max_ps(_mm512_max_ps(size_a, size_b));
    const __m512 inverse = _mm512_set1_ps(inverse_step(127.0f, most + total * 0.0f, &steps[s]));
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), u = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(v));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kLanes), _mm512_cvtepi32_epi8(u));
    *sum += float(_mm512_reduce_add_epi32(_mm512_add_epi32(u, v))) * steps[s];
  }
}

void add_tile_of_bytes(const TileTask& task) {
  Tile tile;
  task.weight->uniform ? dequantize<Uniform>(task, tile) : dequantize<Free>(task, tile);
  Prefetch prefetch{task.ahead, task.ahead + task.ahead_bytes};
  int64_t m = 0;
  for (; m + 2 <= task.tokens; m += 2) multiply<2>(task, tile, m, prefetch);
  if (m < task.tokens) multiply<1>(task, tile, m, prefetch);
}

}  // namespace lutgemm::vbmi
LUTGEMM_TARGET_END
#endif
