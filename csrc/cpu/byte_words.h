// BiQGEMM by 6 signs at a time, AVX-512: one row block, one span, several tokens. Included inside a target region,
// hence in an unnamed namespace and with no include guard; its own includes must have been seen before the region, and
// there,
//
//   __m512i load_codes(const uint8_t* codes)      the code bytes of a slice as bits of k, however they are stored
//
//   three code bytes of a row = 24 signs = four indices of 6 bits, in 16-bit words, unpacked once for all tokens
//   look up  vpermi2w: 32 entries of 16 bits out of 64; it reads only the low 6 bits of an index
//   add      in 16 bits: the step is chosen so that they hold every sum
//
// A look-up and its addition take 1.43 cycles for 32 rows and 6 k on Zen 4, a quarter less per weight than whole bytes,
// which take 5.1 for 64 rows and 8 k. Tables of 64 entries are loaded once for the two halves of a row block and two
// planes.
#include "byte_kernels.h"
#include "byte_scales_avx512.h"

namespace lutgemm {
namespace {

using namespace avx512;

constexpr int kTokensAtOnce = 4;

// Up to so many tokens the sums leave registers for unpacking indices on the way, which costs less than storing them.
constexpr int64_t kMostPacked = 3;

constexpr int64_t kIndexBytes = 128;  // of one look-up: 64 rows' words

inline uint8_t* store_indices(uint8_t* out, __m512i low, __m512i high, unsigned shift) {
  _mm512_store_si512(out, _mm512_srli_epi16(low, shift));
  _mm512_store_si512(out + 64, _mm512_srli_epi16(high, shift));
  return out + kIndexBytes;
}

// One plane's code bytes [slices] -> indices [word_look_ups(slices)][64 words]. What lies above the low 6 bits of a
// word is ignored; what lies beyond the span is looked up in tables of zeros.
void unpack_indices(const uint8_t* codes, int64_t slices, int64_t slice_bytes, uint8_t* out) {
  int64_t j = 0;
  for (; j + 3 <= slices; j += 3, codes += 3 * slice_bytes) {
    const __m512i a = load_codes(codes), b = load_codes(codes + slice_bytes), c = load_codes(codes + 2 * slice_bytes);
    const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
    const __m512i bc_low = _mm512_unpacklo_epi8(b, c), bc_high = _mm512_unpackhi_epi8(b, c);
    out = store_indices(out, ab_low, ab_high, 0);
    out = store_indices(out, ab_low, ab_high, 6);
    out = store_indices(out, bc_low, bc_high, 4);
    out = store_indices(out, bc_low, bc_high, 10);
  }
  if (j == slices) return;
  const bool two = j + 2 == slices;
  const __m512i a = load_codes(codes), b = two ? load_codes(codes + slice_bytes) : _mm512_setzero_si512();
  const __m512i low = _mm512_unpacklo_epi8(a, b), high = _mm512_unpackhi_epi8(a, b);
  out = store_indices(out, low, high, 0);
  out = store_indices(out, low, high, 6);
  if (two) store_indices(out, low, high, 12);
}

// The lines of a piece that is read soon, asked for a few at a time between look-ups: asked for at once they fill the
// miss buffers and hold everything up (weights in DRAM took 1.5 times as long).
struct Prefetch {
  const uint8_t *at, *end;

  void next() {
    if (at >= end) return;
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
    at += 64;
  }
};

// What a row block's part of a span is to all its tokens.
struct Block {
  alignas(64) uint8_t indices[kMaxBits][kSpanWordLookUps * kIndexBytes];
  alignas(64) float planes[kMaxBits][kByteRows];
  alignas(64) float sum_term[kByteRows];
  bool has_sum_term;
};

constexpr int64_t kTokenEntries = kSpanWordLookUps * kWordEntries;

// Look-ups of one table for all rows, planes and tokens. tables: of the first token.
template <int kPlanes, int kTokens>
inline void look_up(const int16_t* tables, const __m512i (&index)[kPlanes][2], __m512i (&dot)[kTokens][kPlanes][2]) {
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; ++m) {
    const __m512i t0 = _mm512_load_si512(tables + m * kTokenEntries);
    const __m512i t1 = _mm512_load_si512(tables + m * kTokenEntries + 32);
#pragma GCC unroll 3
    for (int p = 0; p < kPlanes; ++p) {
      dot[m][p][0] = _mm512_add_epi16(dot[m][p][0], _mm512_permutex2var_epi16(t0, index[p][0], t1));
      dot[m][p][1] = _mm512_add_epi16(dot[m][p][1], _mm512_permutex2var_epi16(t0, index[p][1], t1));
    }
  }
}

template <int kPlanes>
inline void shift(const __m512i (&from)[kPlanes][2], unsigned count, __m512i (&to)[kPlanes][2]) {
#pragma GCC unroll 3
  for (int p = 0; p < kPlanes; ++p) {
    to[p][0] = _mm512_srli_epi16(from[p][0], count);
    to[p][1] = _mm512_srli_epi16(from[p][1], count);
  }
}

// The look-ups of a span, indices read as `unpack_indices` left them.
template <int kPlanes, int kTokens>
inline void look_up_unpacked(const WordTask& task, const Block& block, int first, const int16_t* tables,
                             Prefetch& prefetch, __m512i (&dot)[kTokens][kPlanes][2]) {
  const int64_t look_ups = word_look_ups(task.slices);
  for (int64_t j = 0; j < look_ups; ++j, tables += kWordEntries) {
    __m512i index[kPlanes][2];
#pragma GCC unroll 3
    for (int p = 0; p < kPlanes; ++p) {
      prefetch.next();
      index[p][0] = _mm512_load_si512(block.indices[first + p] + j * kIndexBytes);
      index[p][1] = _mm512_load_si512(block.indices[first + p] + j * kIndexBytes + 64);
    }
    look_up(tables, index, dot);
  }
}

// The same with indices unpacked on the way, which saves storing them.
template <int kPlanes, int kTokens>
inline void look_up_packed(const WordTask& task, int first, const int16_t* tables, Prefetch& prefetch,
                           __m512i (&dot)[kTokens][kPlanes][2]) {
  const int64_t slice_bytes = task.weight->bits * kByteRows;
  const uint8_t* codes = task.piece.codes + first * kByteRows;
  __m512i ab[kPlanes][2], bc[kPlanes][2];
  int64_t j = 0;
  for (; j + 3 <= task.slices; j += 3, codes += 3 * slice_bytes, tables += 4 * kWordEntries) {
#pragma GCC unroll 3
    for (int p = 0; p < kPlanes; ++p) {
      for (int i = 0; i < 4; ++i) prefetch.next();
      const uint8_t* at = codes + p * kByteRows;
      const __m512i a = load_codes(at), b = load_codes(at + slice_bytes), c = load_codes(at + 2 * slice_bytes);
      ab[p][0] = _mm512_unpacklo_epi8(a, b);
      ab[p][1] = _mm512_unpackhi_epi8(a, b);
      bc[p][0] = _mm512_unpacklo_epi8(b, c);
      bc[p][1] = _mm512_unpackhi_epi8(b, c);
    }
    look_up(tables, ab, dot);
    shift(ab, 6, ab);
    look_up(tables + kWordEntries, ab, dot);
    shift(bc, 4, bc);
    look_up(tables + 2 * kWordEntries, bc, dot);
    shift(bc, 6, bc);
    look_up(tables + 3 * kWordEntries, bc, dot);
  }
  if (j == task.slices) return;
  const bool two = j + 2 == task.slices;
#pragma GCC unroll 3
  for (int p = 0; p < kPlanes; ++p) {
    const uint8_t* at = codes + p * kByteRows;
    const __m512i a = load_codes(at), b = two ? load_codes(at + slice_bytes) : _mm512_setzero_si512();
    ab[p][0] = _mm512_unpacklo_epi8(a, b);
    ab[p][1] = _mm512_unpackhi_epi8(a, b);
  }
  look_up(tables, ab, dot);
  shift(ab, 6, ab);
  look_up(tables + kWordEntries, ab, dot);
  if (!two) return;
  shift(ab, 6, ab);
  look_up(tables + 2 * kWordEntries, ab, dot);
}

// y of kTokens tokens += planes first .. first + kPlanes - 1.
template <int kPlanes, int kTokens>
inline void add_planes(const WordTask& task, const Block& block, int first, int64_t m0, Prefetch& prefetch) {
  __m512i dot[kTokens][kPlanes][2];
  for (auto& token : dot) {
    for (auto& plane : token) plane[0] = plane[1] = _mm512_set1_epi16(int16_t(0x8000));
  }
  const int16_t* tables = task.tables + m0 * kTokenEntries;
  if (task.tokens > kMostPacked) {
    look_up_unpacked(task, block, first, tables, prefetch, dot);
  } else {
    look_up_packed(task, first, tables, prefetch, dot);
  }
#pragma GCC unroll 4
  for (int m = 0; m < kTokens; ++m) {
    const __m512 step = _mm512_set1_ps(task.steps[m0 + m]);
    __m512 t[kVectors];
    for (auto& v : t) v = _mm512_setzero_ps();
#pragma GCC unroll 3
    for (int p = 0; p < kPlanes; ++p) {
      __m512 rows[kVectors];
      widen(dot[m][p][0], dot[m][p][1], rows);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) {
        const __m512 v = _mm512_sub_ps(rows[r], _mm512_set1_ps(8388608.0f + 32768.0f));
        t[r] = _mm512_fmadd_ps(_mm512_load_ps(block.planes[first + p] + r * kLanes), v, t[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) {
      float* at = task.y + (m0 + m) * kByteRows + r * kLanes;
      __m512 y = _mm512_loadu_ps(at);
      if (first == 0 && block.has_sum_term) {
        y = _mm512_fmadd_ps(_mm512_load_ps(block.sum_term + r * kLanes), _mm512_set1_ps(task.sums[m0 + m]), y);
      }
      _mm512_storeu_ps(at, _mm512_fmadd_ps(step, t[r], y));
    }
  }
}

// Planes in pairs; the last three together, for at most two tokens at a time, because their sums and indices then fill
// the registers.
template <int kTokens>
void add_tokens(const WordTask& task, const Block& block, int64_t m0, Prefetch& prefetch) {
  int b = 0;
  for (; task.weight->bits - b > 3 || task.weight->bits - b == 2; b += 2) {
    add_planes<2, kTokens>(task, block, b, m0, prefetch);
  }
  if (task.weight->bits - b == 1) add_planes<1, kTokens>(task, block, b, m0, prefetch);
  if (task.weight->bits - b == 3) {
    constexpr int kFirst = kTokens < 2 ? kTokens : 2;
    add_planes<3, kFirst>(task, block, b, m0, prefetch);
    if constexpr (kTokens > 2) add_planes<3, kTokens - 2>(task, block, b, m0 + 2, prefetch);
  }
}

void add_words(const WordTask& task) {
  Block block;
  const ByteScales scales(*task.weight, task.piece.scales);
  const int64_t slice_bytes = task.weight->bits * kByteRows;
  const bool uniform = task.weight->uniform;
  block.has_sum_term = scales.has_sum_term();
  for (int r = 0; r < kVectors; ++r) {
    const __m512 unit =
        uniform ? load16(task.piece.scales, task.weight->scale_dtype, r * kLanes) : _mm512_set1_ps(1.0f);
    for (int b = 0; b < task.weight->bits; ++b) {
      _mm512_store_ps(block.planes[b] + r * kLanes, _mm512_mul_ps(unit, scales.plane(b, r)));
    }
    if (block.has_sum_term) {
      _mm512_store_ps(block.sum_term + r * kLanes, _mm512_mul_ps(unit, scales.sum_term(r)));
    }
  }
  for (int b = 0; b < task.weight->bits && task.tokens > kMostPacked; ++b) {
    unpack_indices(task.piece.codes + b * kByteRows, task.slices, slice_bytes, block.indices[b]);
  }
  Prefetch prefetch{task.ahead, task.ahead + task.ahead_bytes};
  for (int64_t m = 0; m < task.tokens; m += kTokensAtOnce) {
    switch (task.tokens - m) {
      case 1:
        add_tokens<1>(task, block, m, prefetch);
        break;
      case 2:
        add_tokens<2>(task, block, m, prefetch);
        break;
      case 3:
        add_tokens<3>(task, block, m, prefetch);
        break;
      default:
        add_tokens<4>(task, block, m, prefetch);
    }
  }
}

}  // namespace
}  // namespace lutgemm
