// What the kernels of tile_gemm.h share: 64 rows and up to 128 k of codes -> integers in L1. Included inside a target
// region with AVX-512 VBMI and GFNI, hence in an unnamed namespace and with no include guard; its own includes must
// have been seen before the region.
//
// `Decode<kHigh, kLow>` makes 16 rows' integers of kParts parts of a slice from the bits of its first kHigh and its
// other kLow planes. kMost, kZero: of the free kind, the largest integer and what stands for 0.
#include <cmath>
#include <limits>

#include "byte_kernels.h"
#include "byte_scales_avx512.h"
#include "tile_gemm.h"

namespace lutgemm::vbmi {
namespace {

using avx512::ByteScales;
using avx512::kLanes;
using avx512::kVectors;
using avx512::load16;

constexpr int kNibble = 4;  // planes of a bit matrix

// What a row block's part of a span is to all its tokens.
struct Tile {
  alignas(64) int32_t w[kTileFeatures / 2][kByteRows];  // two integers of 16 bits of a row, or four of 8
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

// Shift counts of the even and of the odd rows, 32 bits each.
inline __m512i by_row(int even, int odd) { return _mm512_set1_epi64(int64_t(uint64_t(odd) << 32 | uint64_t(even))); }

// The planes of a row, and the unit it counts in: 0 in a row of weights below 1e-34, whose reciprocal would overflow.
struct FreeRow {
  ByteScales scales;
  int r;
  __m512 inverse;

  FreeRow(const TileTask& task, int r, const float* units) : scales(*task.weight, task.scales), r(r) {
    const __m512 unit = _mm512_load_ps(units + r * kLanes);
    const __mmask16 usable = _mm512_cmp_ps_mask(unit, _mm512_set1_ps(std::numeric_limits<float>::min()), _CMP_GE_OQ);
    inverse = _mm512_maskz_div_ps(usable, _mm512_set1_ps(1.0f), unit);
  }
  __m512 plane(int b) const {
    return b < scales.bits ? _mm512_mul_ps(scales.plane(b, r), inverse) : _mm512_setzero_ps();
  }
  __m512 offset() const {
    return scales.has_offsets ? _mm512_mul_ps(scales.sum_term(r), inverse) : _mm512_setzero_ps();
  }
  // base + the sum of planes 2 pair and 2 pair + 1 with signs --, -+, +-, ++
  void levels(int pair, __m512 base, __m512i (&out)[4]) const {
    const __m512 first = plane(2 * pair), second = plane(2 * pair + 1);
    out[0] = _mm512_cvtps_epi32(_mm512_sub_ps(base, _mm512_add_ps(first, second)));
    out[1] = _mm512_cvtps_epi32(_mm512_add_ps(base, _mm512_sub_ps(second, first)));
    out[2] = _mm512_cvtps_epi32(_mm512_add_ps(base, _mm512_sub_ps(first, second)));
    out[3] = _mm512_cvtps_epi32(_mm512_add_ps(base, _mm512_add_ps(first, second)));
  }
};

// Units and zeros of 16 rows.
template <template <int, int> class Decode>
inline void set_units(const TileTask& task, int r, Tile& tile) {
  const PackedBytes& weight = *task.weight;
  const ByteScales scales(weight, task.scales);
  __m512 unit, zero = _mm512_set1_ps(float(Decode<1, 0>::kZero));
  if (weight.uniform) {
    const float shift = std::ldexp(1.0f, (weight.bits > kNibble ? 8 : 4) - weight.bits);
    const __m512 middle = _mm512_set1_ps(float((1 << weight.bits) - 1) / 2);
    unit = _mm512_mul_ps(load16(task.scales, weight.scale_dtype, r * kLanes), _mm512_set1_ps(1.0f / shift));
    zero = _mm512_mul_ps(_mm512_sub_ps(middle, scales.sum_term(r)), _mm512_set1_ps(shift));
  } else {
    const int look_ups = (weight.bits + 1) / 2;
    __m512 most = scales.has_offsets ? _mm512_abs_ps(scales.sum_term(r)) : _mm512_setzero_ps();
    for (int b = 0; b < weight.bits; ++b) most = _mm512_add_ps(most, _mm512_abs_ps(scales.plane(b, r)));
    unit = _mm512_mul_ps(most, _mm512_set1_ps(1.0f / (float(Decode<1, 0>::kMost) - 0.5f * float(look_ups) - 0.5f)));
  }
  _mm512_store_ps(tile.unit + r * kLanes, unit);
  _mm512_store_ps(tile.zero + r * kLanes, zero);
}

template <template <int, int> class Decode, int kHigh, int kLow>
void dequantize(const TileTask& task, Tile& tile) {
  constexpr int kParts = Decode<kHigh, kLow>::kParts;
  for (int r = 0; r < kVectors; ++r) set_units<Decode>(task, r, tile);
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
      for (int part = 0; part < kParts; ++part) {
        const __m512i below = kLow ? low[kLow ? j : 0][r] : _mm512_setzero_si512();
        _mm512_store_si512(tile.w[kParts * j + part] + r * kLanes, decode(high[j][r], below, part));
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

}  // namespace
}  // namespace lutgemm::vbmi
