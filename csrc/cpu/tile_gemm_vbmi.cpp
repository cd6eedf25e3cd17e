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
namespace lutgemm::vbmi {
namespace {

using avx512::ByteScales;
using avx512::kLanes;
using avx512::kVectors;
using avx512::load16;

constexpr int64_t kPairs = kTileFeatures / 2;
constexpr int kNibble = 4;  // planes of a bit matrix

// What a row block's part of a span is to all its tokens.
struct Tile {
  alignas(64) int32_t w[kPairs][kByteRows];  // two k of a row, 16 bits each
  alignas(64) float unit[kByteRows], zero[kByteRows];
};

// The code bytes of a slice, unfolded, as in byte_words_vbmi.cpp.
inline __m512i load_codes(const uint8_t* codes) {
  const __m512i matrix = _mm512_set1_epi64(int64_t(0x8182'8488'90A0'C080));
  return _mm512_gf2p8affine_epi64_epi8(_mm512_loadu_si512(codes), matrix, 0x80);
}

// Up to 4 planes of a slice -> bytes (p0, p1, p2, p3) of 16 rows in each of 4 vectors.
template <int kPlanes>
inline void interleave(const uint8_t* codes, __m512i (&out)[kVectors]) {
  const __m512i none = _mm512_setzero_si512();
  const __m512i a = load_codes(codes), b = kPlanes > 1 ? load_codes(codes + kByteRows) : none;
  const __m512i c = kPlanes > 2 ? load_codes(codes + 2 * kByteRows) : none;
  const __m512i d = kPlanes > 3 ? load_codes(codes + 3 * kByteRows) : none;
  const __m512i ab[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
  const __m512i cd[2] = {_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    out[2 * i] = _mm512_unpacklo_epi16(ab[i], cd[i]);
    out[2 * i + 1] = _mm512_unpackhi_epi16(ab[i], cd[i]);
  }
}

// Bits of k = 2 pair and 2 pair + 1: 16-bit words for both k of each row. Of even rows in bits 4 to 7, of odd ones in
// bits 0 to 3, the first plane highest; the other 4 bits are the neighbour's.
inline __m512i two_k(__m512i matrices, int pair) {
  const __m512i select = _mm512_set1_epi32(int((1u << (2 * pair)) | (2u << (2 * pair + 16))));
  return _mm512_gf2p8affine_epi64_epi8(select, matrices, 0);
}

// Shift counts of words: `even` for the rows 0, 2, ..., `odd` for the others.
inline __m512i by_row(int even, int odd) {
  return _mm512_set1_epi64(int64_t(even * 0x0001'0001ULL | (uint64_t(odd) * 0x0001'0001ULL) << 32));
}

// The integers of 16 rows and 2 k, shifted up to 4 or 8 bits.
template <int kHigh, int kLow>
struct Uniform {
  Uniform(const TileTask&, int, const float*) {}
  __m512i operator()(__m512i high, __m512i low, int pair) const {
    const __m512i nibble = _mm512_set1_epi16(0x0F);
    const __m512i u = two_k(high, pair);
    if (kLow == 0) return _mm512_and_si512(_mm512_srlv_epi16(u, by_row(4, 0)), nibble);
    const __m512i above = _mm512_and_si512(_mm512_sllv_epi16(u, by_row(0, 4)), _mm512_set1_epi16(0xF0));
    const __m512i below = _mm512_srlv_epi16(two_k(low, pair), by_row(4, 0));
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

  // In units of w. base: added to each level.
  Levels(__m512 first, __m512 second, __m512 base) {
    const __m512i both = _mm512_cvtps_epi32(_mm512_add_ps(base, _mm512_add_ps(first, second)));
    const __m512i one = _mm512_cvtps_epi32(_mm512_add_ps(base, _mm512_sub_ps(first, second)));
    const __m512i two = _mm512_cvtps_epi32(_mm512_add_ps(base, _mm512_sub_ps(second, first)));
    const __m512i none = _mm512_cvtps_epi32(_mm512_sub_ps(base, _mm512_add_ps(first, second)));
    const __m512i below = _mm512_mask_blend_epi16(0xAAAA'AAAAu, none, _mm512_slli_epi32(two, 16));
    const __m512i above = _mm512_mask_blend_epi16(0xAAAA'AAAAu, one, _mm512_slli_epi32(both, 16));
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
  static constexpr int kBits = kHigh + kLow, kLookUps = (kBits + 1) / 2;
  Levels levels[kLookUps];

  Free(const TileTask& task, int r, const float* unit) {
    const ByteScales scales(*task.weight, task.scales);
    const __m512 size = _mm512_loadu_ps(unit + r * kLanes), none = _mm512_setzero_ps();
    // A unit whose reciprocal overflows belongs to weights below 1e-34: zeros.
    const __mmask16 usable = _mm512_cmp_ps_mask(size, _mm512_set1_ps(std::numeric_limits<float>::min()), _CMP_GE_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(1.0f), size);
    for (int p = 0; p < kLookUps; ++p) {
      const __m512 base = p == 0 && scales.has_offsets ? scales.sum_term(r) : none;
      const __m512 second = 2 * p + 1 < kBits ? scales.plane(2 * p + 1, r) : none;
      levels[p] = Levels(_mm512_mul_ps(scales.plane(2 * p, r), inverse), _mm512_mul_ps(second, inverse),
                         _mm512_mul_ps(base, inverse));
    }
  }
  __m512i operator()(__m512i high, __m512i low, int pair) const {
    __m512i u = two_k(high, pair);
    __m512i w = levels[0](_mm512_srlv_epi16(u, by_row(6, 2)));
    if constexpr (kHigh > 2) w = _mm512_add_epi16(w, levels[1](_mm512_srlv_epi16(u, by_row(4, 0))));
    if constexpr (kLow > 0) {
      u = two_k(low, pair);
      w = _mm512_add_epi16(w, levels[2](_mm512_srlv_epi16(u, by_row(6, 2))));
    }
    if constexpr (kLow > 2) w = _mm512_add_epi16(w, levels[3](_mm512_srlv_epi16(u, by_row(4, 0))));
    return w;
  }
};

// Units and zeros of 16 rows.
inline void set_units(const TileTask& task, int r, Tile& tile) {
  const PackedBytes& weight = *task.weight;
  const ByteScales scales(weight, task.scales);
  __m512 unit, zero = _mm512_setzero_ps();
  if (weight.uniform) {
    const float shift = std::ldexp(1.0f, (weight.bits > kNibble ? 8 : 4) - weight.bits);
    const __m512 middle = _mm512_set1_ps(float((1 << weight.bits) - 1) / 2);
    unit = _mm512_mul_ps(load16(task.scales, weight.scale_dtype, r * kLanes), _mm512_set1_ps(1.0f / shift));
    zero = _mm512_mul_ps(_mm512_sub_ps(middle, scales.sum_term(r)), _mm512_set1_ps(shift));
  } else {
    const int look_ups = (weight.bits + 1) / 2;
    __m512 most = scales.has_offsets ? _mm512_abs_ps(scales.sum_term(r)) : zero;
    for (int b = 0; b < weight.bits; ++b) most = _mm512_add_ps(most, _mm512_abs_ps(scales.plane(b, r)));
    unit = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / (float(kMostFree) - 0.5f * float(look_ups) - 0.5f)));
  }
  _mm512_store_ps(tile.unit + r * kLanes, unit);
  _mm512_store_ps(tile.zero + r * kLanes, zero);
}

template <template <int, int> class Decode, int kHigh, int kLow>
void dequantize(const TileTask& task, Tile& tile) {
  const int64_t slice_bytes = task.weight->bits * kByteRows;
  alignas(64) __m512i high[kSpanSlices][kVectors], low[kLow ? kSpanSlices : 1][kVectors];
  for (int64_t j = 0; j < task.slices; ++j) {
    const uint8_t* codes = task.codes + j * slice_bytes;
    interleave<kHigh>(codes, high[j]);
    if constexpr (kLow > 0) interleave<kLow>(codes + kNibble * kByteRows, low[j]);
  }
  for (int r = 0; r < kVectors; ++r) {
    const Decode<kHigh, kLow> decode(task, r, tile.unit);
    for (int64_t j = 0; j < task.slices; ++j) {
#pragma GCC unroll 4
      for (int pair = 0; pair < 4; ++pair) {
        _mm512_store_si512(tile.w[4 * j + pair] + r * kLanes, decode(high[j][r], low[kLow ? j : 0][r], pair));
      }
    }
  }
}

template <template <int, int> class Decode>
void dequantize(const TileTask& task, Tile& tile) {
  switch (task.weight->bits) {
    case 1:
      return dequantize<Decode, 1, 0>(task, tile);
    case 2:
      return dequantize<Decode, 2, 0>(task, tile);
    case 3:
      return dequantize<Decode, 3, 0>(task, tile);
    case 4:
      return dequantize<Decode, 4, 0>(task, tile);
    case 5:
      return dequantize<Decode, 4, 1>(task, tile);
    case 6:
      return dequantize<Decode, 4, 2>(task, tile);
    case 7:
      return dequantize<Decode, 4, 3>(task, tile);
    default:
      return dequantize<Decode, 4, 4>(task, tile);
  }
}

// The lines of a piece that is read soon, asked for one at a time between products: asked for at once they fill the
// miss buffers and hold everything up.
struct Prefetch {
  const uint8_t *at, *end;

  void next() {
    if (at >= end) return;
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    at += 64;
  }
};

template <bool kUniform, int kTokens>
void multiply(const TileTask& task, const Tile& tile, int64_t first, Prefetch& prefetch) {
  __m512i sum[kTokens][kVectors];
  for (auto& token : sum) {
    for (auto& v : token) v = _mm512_setzero_si512();
  }
  const int16_t* q = task.q + first * kTileFeatures;
  const int64_t pairs = task.slices * 4;
  for (int64_t p = 0; p < pairs; ++p, q += 2) {
    prefetch.next();
    __m512i w[kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) w[r] = _mm512_load_si512(tile.w[p] + r * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < kTokens; ++m) {
      int32_t both;
      __builtin_memcpy(&both, q + m * kTileFeatures, sizeof both);
      const __m512i x = _mm512_set1_epi32(both);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) sum[m][r] = _mm512_dpwssd_epi32(sum[m][r], w[r], x);
    }
  }
#pragma GCC unroll 6
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

void round_activations(bool uniform, const float* x, int16_t* q, float* step, float* sum) {
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
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm512_cvtepi32_epi16(v));
  }
  *sum = float(_mm512_reduce_add_epi32(counted)) * *step;
}

void add_tile(const TileTask& task) {
  Tile tile;
  for (int r = 0; r < kVectors; ++r) set_units(task, r, tile);
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
