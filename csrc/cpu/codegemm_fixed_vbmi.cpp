// CodeGEMM with fixed-point tables by AVX-512 VBMI: tables in registers, 64 look-ups at a time.
//
// A table is one plane of 256 bytes or two, a low and a high one; codegemm_planes_vbmi.h looks up in them. The bytes
// found are added without error. T holds sums of 16-bit words, modulo 2^16, and O sums of the words' upper bytes; so O
// are the sums of the odd bytes, and T - 256 * O those of the even ones.
//
//   bits   planes          per 64 look-ups, beyond the look-ups of 2 instructions per plane
//   8      8               3 instructions: T, shift, O
//   14     7 low, 7 high   2 look-ups are added as bytes first: 4 instructions
//   16     8 low, 8 high   6 instructions
//
// Shuffles go one per cycle on a Zen 4 core, which is the bound: at two planes 6.0 cycles per 64 look-ups, 4 of them
// shuffles.
#include "isa.h"

#if LUTGEMM_X86
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "codegemm_fixed.h"
#include "lut_avx512.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // of gcc's own headers: the registers that they leave undefined
#endif

LUTGEMM_TARGET_AVX512VBMI_BEGIN
#include "byte_planes_vbmi.h"
#include "codegemm_planes_vbmi.h"

namespace lutgemm {
namespace {

// Two classes cost a second flush of all sums. They are made where they bring the sum of squared errors to this part.
// 14 bits need them only next to outliers, 8 and 16 bits also for the second of several codebooks.
template <int kBits>
constexpr float kWorthwhile = kBits == 14 ? 0.3f : 0.6f;

template <int kBits>
struct Tables {
  static constexpr int kPlanes = kBits > 8 ? 2 : 1;
  static constexpr int kTableBytes = kPlanes * kPlaneBytes;
  static constexpr bool kPaired = kBits == 14;          // bytes of 7 bits, that can be added by twos
  static constexpr int kRadix = kPaired ? 128 : 256;    // of the high plane
  static constexpr int kBias = 1 << (kPaired ? 6 : 7);  // of a table entry, in units of its highest plane
  static constexpr int kPrefetches = kBits == 8 ? 3 : 2;
  static constexpr bool kFloat = kBits == 16;  // made in fp32: int16 factors would show in the result
  // Largest |P|: room for half a table unit, and for the rounding of x, at most sqrt(vec_len) / 2 * |C / uc| <= 2^18.
  static constexpr int kHalfUnit = 1 << (30 - kBits);
  static constexpr float kLargest = kFloat ? 1.0f - 0x1p-14f : 0x1p30f - 0x1p19f - kHalfUnit;
};

inline __mmask16 first_lanes(int count) { return __mmask16(count >= 16 ? 0xFFFF : count > 0 ? (1 << count) - 1 : 0); }

// Largest magnitude of x; infinity when a value is not finite.
float largest_magnitude(const float* x, int count) {
  __m512i bits = _mm512_setzero_si512();
  for (int k = 0; k < count; k += 16) {
    const __m512i v = _mm512_maskz_loadu_epi32(first_lanes(count - k), x + k);
    bits = _mm512_max_epu32(bits, _mm512_and_si512(v, _mm512_set1_epi32(0x7FFFFFFF)));
  }
  const uint32_t largest_bits = _mm512_reduce_max_epu32(bits);
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  return largest;
}

// squares[k] = sum over the vector that holds k of (x * factor)^2
void square_norms(const float* x, int count, int vec_len, float factor, float* squares) {
  for (int k = 0; k < count; k += 16) {
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(count - k), x + k), _mm512_set1_ps(factor));
    __m512 sum = _mm512_mul_ps(v, v);
    sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xB1));
    if (vec_len >= 4) sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4E));
    if (vec_len >= 8) sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xB1));
    if (vec_len >= 16) sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0x4E));
    _mm512_storeu_ps(squares + k, sum);
  }
}

// The factors of x that bring the products of a class to at most kLargest: x * inverse * factor.
struct Scaling {
  float inverse;       // of the largest magnitude of x, so that no square overflows or vanishes
  float factor[2][4];  // [class][codebook]
};

// Sorts the entries into classes and finds their steps.
template <int kBits>
Scaling classify(const FixedBuildArgs& a, FixedTables& made) {
  const int count = (a.first_codebook + a.entries + a.num_codebooks - 1) / a.num_codebooks * a.vec_len;
  const float magnitude = largest_magnitude(a.x, count);
  const float largest = std::max(magnitude, 0x1p-120f);
  Scaling scaling{1.0f / largest, {}};

  float norm = 0x1p-126f, part[4] = {};  // largest of the codebooks' norms, and their squares in units of its square
  for (int c = 0; c < a.num_codebooks; ++c) norm = std::max(norm, a.rounded->norm[c]);
  for (int c = 0; c < a.num_codebooks; ++c) {
    const float relative = a.rounded->norm[c] / norm;
    part[c] = relative * relative;
  }
  alignas(64) float squares[kTileEntries * 16], bounds[kTileEntries] = {};  // of squared bounds
  square_norms(a.x, count, a.vec_len, scaling.inverse, squares);
  const float* square = squares;
  for (int e = 0, c = a.first_codebook; e < a.entries; ++e) {
    bounds[e] = *square * part[c];
    if (++c == a.num_codebooks) c = 0, square += a.vec_len;
  }
  const __m512 low = _mm512_load_ps(bounds), high = _mm512_load_ps(bounds + 16);
  float top[2] = {_mm512_reduce_max_ps(_mm512_max_ps(low, high)), 0.0f};
  uint32_t small = 0;  // entries of the second class
  int smalls = 0;
  float least = kWorthwhile<kBits> * float(a.entries) * top[0];
  for (float part_of_top : {0x1p-2f, 0x1p-4f, 0x1p-8f}) {
    const __m512 limit = _mm512_set1_ps(part_of_top * top[0]);
    const __mmask16 in_low = _mm512_cmp_ps_mask(low, limit, _CMP_LE_OQ) & first_lanes(a.entries);
    const __mmask16 in_high = _mm512_cmp_ps_mask(high, limit, _CMP_LE_OQ) & first_lanes(a.entries - 16);
    const int within = __builtin_popcount(in_low | uint32_t(in_high) << 16);
    const float largest_in =
        _mm512_reduce_max_ps(_mm512_max_ps(_mm512_maskz_mov_ps(in_low, low), _mm512_maskz_mov_ps(in_high, high)));
    const float squares_of_errors = float(a.entries - within) * top[0] + float(within) * largest_in;
    if (squares_of_errors < least) {
      least = squares_of_errors, smalls = within;
      small = in_low | uint32_t(in_high) << 16;
      top[1] = largest_in;
    }
  }
  made.classes = smalls > 0 ? 2 : 1;
  made.count[0] = a.entries - smalls, made.count[1] = smalls;
  if (smalls == 0) {
    for (int e = 0; e < kTileEntries; ++e) made.order[e] = uint16_t(e);
  } else {
    uint16_t* order[2] = {made.order, made.order + made.count[0]};
    for (int e = 0; e < a.entries; ++e) *order[small >> e & 1]++ = uint16_t(e);
  }
  for (int i = 0; i < made.classes; ++i) {
    const float bound = std::max(std::sqrt(top[i]), 0x1p-60f) * (1.0f + 0x1p-20f);
    made.step[i] = magnitude < INFINITY ? bound / Tables<kBits>::kLargest * norm * largest : NAN;
    for (int c = 0; c < a.num_codebooks; ++c) {
      const float unit = Tables<kBits>::kFloat ? 1.0f : a.rounded->unit[c];
      scaling.factor[i][c] = Tables<kBits>::kLargest / bound * (unit / norm);
      made.step[i] += 0.0f * a.rounded->unit[c];  // NaN where that is
    }
    made.step[i] *= Tables<kBits>::kFloat ? 2.0f / (1 << kBits) : float(1 << (31 - kBits));
  }
  return scaling;
}

// 64 sums of build64 -> 64 bytes of each plane.
template <int kBits>
inline void store_planes(__m512i* v, uint8_t* table) {
  using T = Tables<kBits>;
  if constexpr (!T::kPaired) {  // else the high plane is on a byte's border already
    for (int u = 0; u < 4; ++u) v[u] = _mm512_add_epi32(v[u], v[u]);
  }
  __m512i low, high;
  pick_bytes<T::kFloat ? 1 : 2>(v, &low, &high);
  if constexpr (T::kPlanes == 1) {
    _mm512_storeu_si512(table, high);
  } else {
    if constexpr (T::kPaired) low = _mm512_and_si512(_mm512_srli_epi16(low, 1), _mm512_set1_epi8(0x7F));
    _mm512_storeu_si512(table, low);
    _mm512_storeu_si512(table + kPlaneBytes, high);
  }
}

// 64 entries of a table in int32: P + 2^30, rounded to nearest by what is cut off. Bits 30 and below are used.
template <int kBits, int kVecLen>
inline void build64(const int16_t* codebook, const int16_t* x, uint8_t* table) {
  const __m512i bias = _mm512_set1_epi32((1 << 30) + Tables<kBits>::kHalfUnit);
  __m512i v[4] = {bias, bias, bias, bias};
  for (int d = 0; d < kVecLen; d += 2) {
    int32_t pair;
    std::memcpy(&pair, x + d, sizeof pair);
    for (int u = 0; u < 4; ++u) {
      const __m512i centroids = _mm512_loadu_si512(codebook + d * kPlaneBytes + 32 * u);
      v[u] = _mm512_add_epi32(v[u], _mm512_madd_epi16(centroids, _mm512_set1_epi32(pair)));
    }
  }
  store_planes<kBits>(v, table);
}

// The same in fp32: P + 3 is between 2 and 4, so its mantissa, bits 22 and below, is a fixed-point number.
template <int kBits, int kVecLen>
inline void build64(const float* codebook, const float* x, uint8_t* table) {
  const __m512 bias = _mm512_set1_ps(3.0f + 1.0f / (1 << kBits));
  __m512 sum[4] = {bias, bias, bias, bias};
  for (int d = 0; d < kVecLen; ++d) {
    for (int u = 0; u < 4; ++u) {
      const __m512 centroids = _mm512_loadu_ps(codebook + d * kPlaneBytes + 16 * u);
      sum[u] = _mm512_fmadd_ps(centroids, _mm512_set1_ps(x[d]), sum[u]);
    }
  }
  __m512i v[4];
  for (int u = 0; u < 4; ++u) v[u] = _mm512_castps_si512(sum[u]);
  store_planes<kBits>(v, table);
}

// x of an entry, scaled, of kVecLen elements. 16 are stored.
inline void store_scaled(__m512 x, float* out) { _mm512_storeu_ps(out, x); }
inline void store_scaled(__m512 x, int16_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x)));
}

// Factor: int16 or float, of the codebooks and of x.
template <int kBits, int kVecLen, class Factor>
void build_tables(const FixedBuildArgs& a, const Factor* codebooks, const FixedTables& made, const Scaling& scaling) {
  const __m512 inverse = _mm512_set1_ps(scaling.inverse);
  const int books = a.num_codebooks, per_book = 65536 / books + 1;  // instead of a division, for numbers below 36
  const int entries = a.entries, used_entries = a.used_entries;
  Factor x[kTileEntries * kVecLen + 16];
  const Factor* codebook[kTileEntries];
  for (int t = 0; t < entries; ++t) {
    const int at = a.first_codebook + made.order[t], j = at * per_book >> 16, c = at - j * books;
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(first_lanes(kVecLen), a.x + j * kVecLen), inverse);
    store_scaled(_mm512_mul_ps(v, _mm512_set1_ps(scaling.factor[t >= made.count[0]][c])), x + t * kVecLen);
    codebook[t] = codebooks + int64_t(c) * kVecLen * kPlaneBytes;
  }
  constexpr int kNext = 64 * int(sizeof(float) / sizeof(Factor));  // int16 lie in pairs
  uint8_t* table = a.tables;
  for (int t = 0; t < entries; ++t, table += Tables<kBits>::kTableBytes) {
    // Entries up to the next multiple of 64 have zeros as centroids.
    for (int i = 0; i * 64 < used_entries; ++i) {
      build64<kBits, kVecLen>(codebook[t] + i * kNext, x + t * kVecLen, table + i * 64);
    }
  }
}

template <int kBits, int kVecLen>
void build_of(const FixedBuildArgs& a, FixedTables& made) {
  const Scaling scaling = classify<kBits>(a, made);
  if constexpr (Tables<kBits>::kFloat) {
    build_tables<kBits, kVecLen>(a, a.codebooks, made, scaling);
  } else {
    const auto* rounded = reinterpret_cast<const uint8_t*>(a.rounded) + 64;
    build_tables<kBits, kVecLen>(a, reinterpret_cast<const int16_t*>(rounded), made, scaling);
  }
}

template <int kBits>
void build(const FixedBuildArgs& a, FixedTables& made) {
  switch (a.vec_len) {
    case 2:
      return build_of<kBits, 2>(a, made);
    case 4:
      return build_of<kBits, 4>(a, made);
    case 8:
      return build_of<kBits, 8>(a, made);
    default:
      return build_of<kBits, 16>(a, made);
  }
}

// Sums of 64 rows' bytes of one plane or two.
template <int kBits>
struct Sums {
  static constexpr int kPlanes = Tables<kBits>::kPlanes;
  __m512i total[kPlanes], odd[kPlanes];

  // Less the bias of all entries.
  [[gnu::always_inline]] explicit Sums(int entries) {
    for (int b = 0; b < kPlanes; ++b) {
      const int bias = b + 1 == kPlanes ? Tables<kBits>::kBias * entries : 0;
      odd[b] = _mm512_set1_epi16(int16_t(-bias));
      total[b] = _mm512_set1_epi16(int16_t(-257 * bias));
    }
  }

  [[gnu::always_inline]] void add(int b, __m512i bytes) {
    total[b] = _mm512_add_epi16(total[b], bytes);
    odd[b] = _mm512_add_epi16(odd[b], _mm512_srli_epi16(bytes, 8));
  }

  __m512i even(int b) const { return _mm512_sub_epi16(total[b], _mm512_slli_epi16(odd[b], 8)); }
};

// Sums of 16 rows, in units of the step, with the scales, into y (or as far as they go into `partial`).
template <bool kFirst, bool kLast>
[[gnu::always_inline]] inline void flush16(const FixedGatherArgs& a, int row, __m512 sums) {
  const __m512 step = _mm512_set1_ps(a.step);
  sums = kFirst ? _mm512_mul_ps(sums, step) : _mm512_fmadd_ps(sums, step, _mm512_loadu_ps(a.partial + row));
  if constexpr (kLast) {
    _mm512_storeu_ps(a.y + row,
                     _mm512_fmadd_ps(avx512::load16(a.scales, a.scale_dtype, row), sums, _mm512_loadu_ps(a.y + row)));
  } else {
    _mm512_storeu_ps(a.partial + row, sums);
  }
}

// value = low + radix * high of 32 rows, given as pairs of words of the even and of the odd rows.
template <int kBits, bool kFirst, bool kLast>
[[gnu::always_inline]] inline void flush32(const FixedGatherArgs& a, int row, __m512i even, __m512i odd) {
  const __m512i weights = _mm512_set1_epi32(Tables<kBits>::kPlanes == 1 ? 1 : 1 | Tables<kBits>::kRadix << 16);
  const __m512 first = _mm512_cvtepi32_ps(_mm512_madd_epi16(even, weights));
  const __m512 second = _mm512_cvtepi32_ps(_mm512_madd_epi16(odd, weights));
  flush16<kFirst, kLast>(a, row, _mm512_unpacklo_ps(first, second));
  flush16<kFirst, kLast>(a, row + 16, _mm512_unpackhi_ps(first, second));
}

template <int kBits, bool kFirst, bool kLast>
[[gnu::always_inline]] inline void flush64(const FixedGatherArgs& a, int row, const Sums<kBits>& s) {
  constexpr int kHigh = Tables<kBits>::kPlanes - 1;  // with one plane it stands for both: the second's weight is zero
  const __m512i even[2] = {s.even(0), s.even(kHigh)};
  flush32<kBits, kFirst, kLast>(a, row, _mm512_unpacklo_epi16(even[0], even[1]),
                                _mm512_unpacklo_epi16(s.odd[0], s.odd[kHigh]));
  flush32<kBits, kFirst, kLast>(a, row + 32, _mm512_unpackhi_epi16(even[0], even[1]),
                                _mm512_unpackhi_epi16(s.odd[0], s.odd[kHigh]));
}

template <int kBits, bool kFirst, bool kLast>
[[gnu::always_inline]] inline void flush(const FixedGatherArgs& args, const Sums<kBits>& upper,
                                         const Sums<kBits>& lower) {
  const FixedGatherArgs a = args;  // so that stores are seen to leave it alone
  flush64<kBits, kFirst, kLast>(a, 0, upper);
  flush64<kBits, kFirst, kLast>(a, 64, lower);
}

// Again for the lines 4 KiB before, that were asked for 4 KiB ago: of prefetches that come in a burst some are dropped
// (byte_lut_vbmi.cpp). From a busy DRAM: 8 bits 239 us with one, 218 with two, 201 with three; 14 bits 200, 187, 189.
// Always inlined: gcc takes a function of prefetches for one without effect, and leaves out calls of it.
template <int kTimes>
[[gnu::always_inline]] inline void prefetch_stream(const char* at) {
#pragma GCC unroll 3
  for (int i = 0; i < kTimes; ++i) _mm_prefetch(at - i * 4096, _MM_HINT_T1);
}

template <int kBits, int kVectors>
void gather_block(const FixedGatherArgs& a) {
  using T = Tables<kBits>;
  constexpr int kPlanes = T::kPlanes, kTogether = T::kPaired ? 2 : 1;
  Sums<kBits> upper(a.entries), lower(a.entries);
  const uint8_t* table = a.tables;
  const char* next = reinterpret_cast<const char*>(a.next);
  int e = 0;
  for (; e + kTogether <= a.entries; e += kTogether) {
    __m512i bytes[kPlanes][kHalves];
    for (int i = 0; i < kTogether; ++i) {
      __m512i found[kPlanes][kHalves];
      look_up<kPlanes, kVectors>(a.codes + a.order[e + i] * kBlockRows, table, found);
      for (int h = 0; h < kHalves; ++h) {
        prefetch_stream<T::kPrefetches>(next + 64 * h);
        for (int b = 0; b < kPlanes; ++b) {
          bytes[b][h] = i == 0 ? found[b][h] : _mm512_add_epi8(bytes[b][h], found[b][h]);
        }
      }
      next += kBlockRows, table += T::kTableBytes;
    }
    for (int b = 0; b < kPlanes; ++b) upper.add(b, bytes[b][0]), lower.add(b, bytes[b][1]);
  }
  if (e < a.entries) {
    __m512i found[kPlanes][kHalves];
    look_up<kPlanes, kVectors>(a.codes + a.order[e] * kBlockRows, table, found);
    for (int b = 0; b < kPlanes; ++b) upper.add(b, found[b][0]), lower.add(b, found[b][1]);
  }
  if (a.last) {
    const int scale_bytes = kBlockRows * (a.scale_dtype == DType::kFloat32 ? 4 : 2);
    for (int i = 0; i < scale_bytes; i += 64) prefetch_stream<T::kPrefetches>(next + i);
  }
  if (a.first) {
    a.last ? flush<kBits, true, true>(a, upper, lower) : flush<kBits, true, false>(a, upper, lower);
  } else {
    a.last ? flush<kBits, false, true>(a, upper, lower) : flush<kBits, false, false>(a, upper, lower);
  }
}

template <int kBits>
void gather(const FixedGatherArgs& a) {
  if (a.used_entries > 128) {
    gather_block<kBits, 4>(a);
  } else if (a.used_entries > 64) {
    gather_block<kBits, 2>(a);
  } else {
    gather_block<kBits, 1>(a);
  }
}

template <int kBits>
constexpr FixedKernel kernel() {
  return {Tables<kBits>::kTableBytes, build<kBits>, gather<kBits>};
}

}  // namespace

const FixedKernel kFixedVbmi8 = kernel<8>();
const FixedKernel kFixedVbmi14 = kernel<14>();
const FixedKernel kFixedVbmi16 = kernel<16>();

}  // namespace lutgemm

LUTGEMM_TARGET_END
#endif
