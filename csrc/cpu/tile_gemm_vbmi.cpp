// A tile of 64 rows and up to 128 k: codes -> 16-bit integers in L1 -> products with some tokens.
//
//   code bytes of 4 planes, interleaved to a 32-bit word for each row: a 64-bit word is the 8 x 8 bit matrix of 2 rows
//   vgf2p8affineqb  bits of k and k + 1 of each matrix, planes side by side: 4 bits for each of 16 rows and 2 k
//   uniform         these are the integer. free: vpermi2w looks 2 planes up in 16 rows' tables of 4 levels
//   vpdpwssd        16 rows: sum += w[k] q[k] + w[k + 1] q[k + 1]
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

// Bits of k = 2 pair and 2 pair + 1: 16-bit words for both k of each row. Of even rows in bits 4 to 7, of odd ones in
// bits 0 to 3, the first plane highest; the other 4 bits are the neighbour's.
inline __m512i two_k(__m512i matrices, int pair) {
  const __m512i select = _mm512_set1_epi32(int((1u << (2 * pair)) | (2u << (2 * pair + 16))));
  return _mm512_gf2p8affine_epi64_epi8(select, matrices, 0);
}

// The integers of 16 rows and 2 k, shifted up to 4 or 8 bits.
template <int kHigh, int kLow>
struct Uniform {
  static constexpr int kParts = 4, kMost = kMostUniform, kZero = 0;
  Uniform(const TileTask&, int, const float*) {}
  __m512i operator()(__m512i high, __m512i low, int pair) const {
    const __m512i nibble = _mm512_set1_epi16(0x0F);
    const __m512i u = two_k(high, pair);
    if (kLow == 0) return _mm512_and_si512(_mm512_srlv_epi32(u, by_row(4, 0)), nibble);
    const __m512i above = _mm512_and_si512(_mm512_sllv_epi32(u, by_row(0, 4)), _mm512_set1_epi16(0xF0));
    const __m512i below = _mm512_srlv_epi32(two_k(low, pair), by_row(4, 0));
    return _mm512_ternarylogic_epi64(above, below, nibble, 0xF8);  // a | (b & c)
  }
};

// Where row r of 16 lies in a table of levels, which two rounds of interleaving in 128-bit lanes have put in order:
// bits 2 to 5 of the index, for both words of the row.
struct RowBits {
  alignas(64) uint16_t words[32] = {};
  constexpr RowBits() {
    for (int r = 0; r < 16; ++r) {
      const int field = (r % 4) / 2 * 8 + r / 4 * 2 + r % 2;
      words[2 * r] = words[2 * r + 1] = uint16_t(field << 2);
    }
  }
};
constexpr RowBits kRowBits;

// Levels of two planes of 16 rows, 16 bits: entry (row << 2) + (2 bit of the first + bit of the second).
struct Levels {
  __m512i low, high;

  // base: added to each level.
  Levels(const FreeRow& row, int pair, __m512 base) {
    __m512i level[4];
    row.levels(pair, base, level);
    const __m512i below = _mm512_mask_blend_epi16(0xAAAA'AAAAu, level[0], _mm512_slli_epi32(level[1], 16));
    const __m512i above = _mm512_mask_blend_epi16(0xAAAA'AAAAu, level[2], _mm512_slli_epi32(level[3], 16));
    low = _mm512_unpacklo_epi32(below, above);
    high = _mm512_unpackhi_epi32(below, above);
  }
  Levels() = default;

  __m512i operator()(__m512i code) const {
    const __m512i row = _mm512_load_si512(kRowBits.words);
    const __m512i index = _mm512_ternarylogic_epi64(row, code, _mm512_set1_epi16(3), 0xF8);  // a | (b & c)
    return _mm512_permutex2var_epi16(low, index, high);
  }
};

// 16 rows and 2 k: the sum over planes, two at a time, each rounded to the row's unit.
template <int kHigh, int kLow>
struct Free {
  static constexpr int kParts = 4, kMost = kMostFree, kZero = 0, kLookUps = (kHigh + kLow + 1) / 2;
  Levels levels[kLookUps];

  Free(const TileTask& task, int r, const float* units) {
    const FreeRow row(task, r, units);
    for (int p = 0; p < kLookUps; ++p) levels[p] = Levels(row, p, p == 0 ? row.offset() : _mm512_setzero_ps());
  }
  __m512i operator()(__m512i high, __m512i low, int pair) const {
    __m512i u = two_k(high, pair);
    __m512i w = levels[0](_mm512_srlv_epi32(u, by_row(6, 2)));
    if constexpr (kHigh > 2) w = _mm512_add_epi16(w, levels[1](_mm512_srlv_epi32(u, by_row(4, 0))));
    if constexpr (kLow > 0) {
      u = two_k(low, pair);
      w = _mm512_add_epi16(w, levels[2](_mm512_srlv_epi32(u, by_row(6, 2))));
    }
    if constexpr (kLow > 2) w = _mm512_add_epi16(w, levels[3](_mm512_srlv_epi32(u, by_row(4, 0))));
    return w;
  }
};

template <bool kUniform, int kTokens>
void multiply(const TileTask& task, const Tile& tile, int64_t first, Prefetch& prefetch) {
  __m512i sum[kTokens][kVectors];
  for (auto& token : sum) {
    for (auto& v : token) v = _mm512_setzero_si512();
  }
  const auto* q = static_cast<const int16_t*>(task.q) + first * kTileFeatures;
  const int64_t pairs = task.slices * 4;
  for (int64_t p = 0; p < pairs; ++p, q += 2) {
    prefetch.next();
    __m512i w[kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) w[r] = _mm512_load_si512(tile.w[p] + r * kLanes);
#pragma GCC unroll 4
    for (int m = 0; m < kTokens; ++m) {
      int32_t both;
      __builtin_memcpy(&both, q + m * kTileFeatures, sizeof both);
      const __m512i x = _mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) sum[m][r] = _mm512_dpwssd_epi32(sum[m][r], w[r], x);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; ++m) {
    const __m512 step = _mm512_set1_ps(task.steps[first + m]), total = _mm512_set1_ps(task.sums[first + m]);
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) {
      float* y = task.y + (first + m) * kByteRows + r * kLanes;
      __m512 v = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[m][r]), step);
      if (kUniform) v = _mm512_fnmadd_ps(_mm512_load_ps(tile.zero + r * kLanes), total, v);
      _mm512_storeu_ps(y, _mm512_fmadd_ps(_mm512_load_ps(tile.unit + r * kLanes), v, _mm512_loadu_ps(y)));
    }
  }
}

template <bool kUniform>
void multiply(const TileTask& task, const Tile& tile) {
  Prefetch prefetch{task.ahead, task.ahead + task.ahead_bytes};
  int64_t m = 0;
  for (; m + 4 <= task.tokens; m += 4) multiply<kUniform, 4>(task, tile, m, prefetch);
  switch (task.tokens - m) {
    case 3:
      return multiply<kUniform, 3>(task, tile, m, prefetch);
    case 2:
      return multiply<kUniform, 2>(task, tile, m, prefetch);
    case 1:
      return multiply<kUniform, 1>(task, tile, m, prefetch);
    default:
      return;
  }
}

}  // namespace

void round_to_words(bool uniform, const float* x, void* q, float* step, float* sum) {
  auto* out = static_cast<int16_t*>(q);
  __m512 total = _mm512_setzero_ps(), largest = total;
  for (int64_t i = 0; i < kTileFeatures; i += kLanes) {
    const __m512 size = _mm512_abs_ps(_mm512_load_ps(x + i));
    total = _mm512_add_ps(total, size);
    largest = _mm512_max_ps(largest, size);
  }
  const float range = uniform ? float(kTileFeatures * kMostRounded) : float(kMostFreeSum);
  const float all = _mm512_reduce_add_ps(total), most = _mm512_reduce_max_ps(largest) * (range / float(kMostRounded));
  const float inverse = inverse_step(range, (all > most ? all : most) + all * 0.0f, step);
  __m512i counted = _mm512_setzero_si512();
  for (int64_t i = 0; i < kTileFeatures; i += kLanes) {
    const __m512i v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), _mm512_set1_ps(inverse)));
    counted = _mm512_add_epi32(counted, v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi32_epi16(v));
  }
  *sum = float(_mm512_reduce_add_epi32(counted)) * *step;
}

void add_tile_of_words(const TileTask& task) {
  Tile tile;
  if (task.weight->uniform) {
    dequantize<Uniform>(task, tile);
    multiply<true>(task, tile);
  } else {
    dequantize<Free>(task, tile);
    multiply<false>(task, tile);
  }
}

}  // namespace lutgemm::vbmi
LUTGEMM_TARGET_END
#endif
