// LUT-GEMM by whole code bytes, AVX-512 VBMI: one row block, one span, one token.
//
//   index   64 rows' code bytes of one slice and plane, as they lie
//   look up vpermi2b: low and high byte of 64 entries out of 128; it ignores bit 7 of the index
//   sign    bit 7 of the index -> 0xFF or 0 -> exclusive or with both bytes, which complements them
//   add     accurate: bytes interleaved to 16-bit entries, added
//           fast, near-exact: a vector of bytes is added as 16-bit words, and its odd bytes once more on their own;
//           what the odd bytes put into the first sum is subtracted at the end
//
// On Zen 4, in registers, a look-up of 64 rows takes 3.6 cycles with 8 bits and 5.1 with 12 or 16. With bit 7 moved to
// a mask register and masked subtractions in place of the bit matrix: 5.8 to 6.5 with 12 bits, 6.6 to 7.7 with 16.
#include "isa.h"
#if LUTGEMM_X86
#include "byte_kernels.h"
#include "byte_scales_avx512.h"

LUTGEMM_TARGET_AVX512VBMI_BEGIN
#include "byte_planes_vbmi.h"

namespace lutgemm::vbmi {
namespace {

using avx512::ByteScales;
using avx512::kLanes;
using avx512::kVectors;
using avx512::sign_of_bit;
using avx512::widen;

// The stream is read in order, so fixed distances serve spans, row blocks and scales alike. Into L2: prefetches into
// L1 fill its few miss buffers, and weights in DRAM took 1.3 times as long (Zen 4). Each line is asked for two to four
// times: of prefetches that come in a burst, faster than DRAM delivers, some are dropped. At 3 bits 298 us with one,
// 248 with two, 236 with three; one that finds its line in L2 costs 1.5 %, so there are more where less work comes
// between two lines.
constexpr int64_t kPrefetchBytes[] = {16 << 10, 12 << 10, 8 << 10, 20 << 10};

constexpr int prefetches(Accuracy accuracy, int planes) {
  if (accuracy == Accuracy::kNearExact || planes < 2) return 2;
  return planes > 3 ? 4 : planes + (accuracy == Accuracy::kFast ? 1 : 0);
}

// Always inlined: gcc takes a function of prefetches for one without effect, and leaves out calls of it.
template <int kTimes>
[[gnu::always_inline]] inline void prefetch_stream(const uint8_t* at) {
#pragma GCC unroll 4
  for (int i = 0; i < kTimes; ++i) {
    _mm_prefetch(reinterpret_cast<const char*>(at) + kPrefetchBytes[i], _MM_HINT_T1);
  }
}

constexpr int64_t kEntries = 128;

struct Look {
  __m512i low[2], high[2];  // bytes of the entries
};

// 0xFF where bit 7 is set, else 0: a bit matrix of which every row takes bit 7.
inline __m512i sign_bytes(__m512i codes) {
  return _mm512_gf2p8affine_epi64_epi8(codes, _mm512_set1_epi64(int64_t(0x8080'8080'8080'8080)), 0);
}

template <Accuracy kAccuracy>
inline Look load_table(const uint8_t* table) {
  Look t;
  t.high[0] = _mm512_load_si512(table);
  t.high[1] = _mm512_load_si512(table + 64);
  if (kAccuracy != Accuracy::kFast) {
    t.low[0] = _mm512_load_si512(table + 128);
    t.low[1] = _mm512_load_si512(table + 192);
  }
  return t;
}

// Bytes as words, and the odd bytes alone.
struct ByteSum {
  __m512i words, odd;

  [[gnu::always_inline]] void clear() { words = odd = _mm512_setzero_si512(); }
  [[gnu::always_inline]] void add(__m512i bytes) {
    words = _mm512_add_epi16(words, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  }
  [[gnu::always_inline]] void rows(__m512 (&out)[kVectors]) const {
    const __m512i even = _mm512_sub_epi16(words, _mm512_slli_epi16(odd, 8));
    widen(_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd), out);
  }
};

// rows - base, and half a step more for an odd number of slices. Both are exact.
[[gnu::always_inline]] inline void take_off(__m512 (&rows)[kVectors], float base, int64_t slices) {
#pragma GCC unroll 4
  for (int r = 0; r < kVectors; ++r) rows[r] = _mm512_sub_ps(rows[r], _mm512_set1_ps(base));
  if (slices % 2 == 0) return;
#pragma GCC unroll 4
  for (int r = 0; r < kVectors; ++r) rows[r] = _mm512_add_ps(rows[r], _mm512_set1_ps(0.5f));
}

// The dot products of one plane, in steps.
template <Accuracy kAccuracy>
struct Dot;

template <>
struct Dot<Accuracy::kFast> {
  ByteSum high;

  [[gnu::always_inline]] void clear(int64_t) { high.clear(); }
  [[gnu::always_inline]] void add(const Look& t, __m512i index) {
    const __m512i v = _mm512_permutex2var_epi8(t.high[0], index, t.high[1]);
    high.add(_mm512_xor_si512(v, sign_bytes(index)));
  }
  [[gnu::always_inline]] void rows(int64_t slices, __m512 (&out)[kVectors]) const {
    high.rows(out);
    take_off(out, 8388608.0f + float(128 * slices - slices / 2), slices);
  }
};

template <>
struct Dot<Accuracy::kAccurate> {
  __m512i low, high;  // rows of bytes 0-7 and 8-15 of each lane

  // Half a step for each look-up; rows() adds what is left of an odd number of them.
  [[gnu::always_inline]] void clear(int64_t slices) { low = high = _mm512_set1_epi16(int16_t(0x8000 + slices / 2)); }
  [[gnu::always_inline]] void add(const Look& t, __m512i index) {
    const __m512i sign = sign_bytes(index);
    __m512i a = _mm512_permutex2var_epi8(t.low[0], index, t.low[1]);
    __m512i b = _mm512_permutex2var_epi8(t.high[0], index, t.high[1]);
    a = _mm512_xor_si512(a, sign);
    b = _mm512_xor_si512(b, sign);
    low = _mm512_add_epi16(low, _mm512_unpacklo_epi8(a, b));
    high = _mm512_add_epi16(high, _mm512_unpackhi_epi8(a, b));
  }
  [[gnu::always_inline]] void rows(int64_t slices, __m512 (&out)[kVectors]) const {
    widen(low, high, out);
    take_off(out, 8388608.0f + 32768.0f, slices);
  }
};

template <>
struct Dot<Accuracy::kNearExact> {
  ByteSum low, high;

  [[gnu::always_inline]] void clear(int64_t) {
    low.clear();
    high.clear();
  }
  [[gnu::always_inline]] void add(const Look& t, __m512i index) {
    const __m512i sign = sign_bytes(index);
    const __m512i a = _mm512_permutex2var_epi8(t.low[0], index, t.low[1]);
    const __m512i b = _mm512_permutex2var_epi8(t.high[0], index, t.high[1]);
    low.add(_mm512_xor_si512(a, sign));
    high.add(_mm512_xor_si512(b, sign));
  }
  [[gnu::always_inline]] void rows(int64_t slices, __m512 (&out)[kVectors]) const {
    __m512 tail[kVectors];
    high.rows(out);
    low.rows(tail);
    const __m512 base = _mm512_set1_ps(8388608.0f);
    for (int r = 0; r < kVectors; ++r) {
      const __m512 v =
          _mm512_fmadd_ps(_mm512_sub_ps(out[r], base), _mm512_set1_ps(256.0f), _mm512_sub_ps(tail[r], base));
      out[r] = _mm512_sub_ps(v, _mm512_set1_ps(32767.5f * float(slices)));
    }
  }
};

// t [block][4] += scale * dot of planes first .. first + kPlanes - 1.
template <Accuracy kAccuracy, int kPlanes, int kBlocks>
[[gnu::always_inline]] inline void add_planes(const ByteTask& task, int first, __m512 (&t)[kBlocks][kVectors]) {
  Dot<kAccuracy> dot[kBlocks][kPlanes];
#pragma GCC unroll 2
  for (int i = 0; i < kBlocks; ++i) {
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) dot[i][p].clear(task.slices);
  }
  const int64_t slice_bytes = task.weight->bits * kByteRows;
  const uint8_t* tables = task.tables;
  for (int64_t j = 0; j < task.slices; ++j, tables += byte_table_bytes(kAccuracy)) {
    const Look table = load_table<kAccuracy>(tables);
#pragma GCC unroll 2
    for (int i = 0; i < kBlocks; ++i) {
      const uint8_t* codes = task.pieces[i].codes + first * kByteRows + j * slice_bytes;
#pragma GCC unroll 4
      for (int p = 0; p < kPlanes; ++p, codes += kByteRows) {
        prefetch_stream<prefetches(kAccuracy, kPlanes)>(codes);
        __m512i index = _mm512_loadu_si512(codes);
        asm("" : "+v"(index));  // look-ups overwrite it: gcc would load it again for each
        dot[i][p].add(table, index);
      }
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kBlocks; ++i) {
    const ByteScales scales(*task.weight, task.pieces[i].scales);
#pragma GCC unroll 4
    for (int p = 0; p < kPlanes; ++p) {
      __m512 rows[kVectors], scale[kVectors];
      dot[i][p].rows(task.slices, rows);
      scales.plane(first + p, scale);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) t[i][r] = _mm512_fmadd_ps(scale[r], rows[r], t[i][r]);
    }
  }
}

// Planes beyond the registers' sums are looked up in passes of at most kMostPlanes.
template <Accuracy kAccuracy, int kBlocks, int kMostPlanes>
void add_blocks(const ByteTask& task) {
  const PackedBytes& weight = *task.weight;
  __m512 t[kBlocks][kVectors];
#pragma GCC unroll 2
  for (int i = 0; i < kBlocks; ++i) {
    for (int64_t at = 0; at < weight.scale_bytes; at += 64) {
      prefetch_stream<prefetches(kAccuracy, 2)>(task.pieces[i].scales + at);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) t[i][r] = _mm512_setzero_ps();
  }
  int b = 0;
  for (; b + kMostPlanes <= weight.bits; b += kMostPlanes) add_planes<kAccuracy, kMostPlanes, kBlocks>(task, b, t);
  switch (weight.bits - b) {
    case 3:
      if constexpr (kMostPlanes > 3) add_planes<kAccuracy, 3, kBlocks>(task, b, t);
      break;
    case 2:
      if constexpr (kMostPlanes > 2) add_planes<kAccuracy, 2, kBlocks>(task, b, t);
      break;
    case 1:
      if constexpr (kMostPlanes > 1) add_planes<kAccuracy, 1, kBlocks>(task, b, t);
      break;
    default:
      break;
  }
#pragma GCC unroll 2
  for (int i = 0; i < kBlocks; ++i) {
    const ByteScales scales(weight, task.pieces[i].scales);
    float* y = task.y + i * kByteRows;
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) t[i][r] = _mm512_mul_ps(t[i][r], _mm512_set1_ps(task.step));
    if (scales.has_sum_term()) {
      __m512 sum_term[kVectors];
      scales.sum_term(sum_term);
#pragma GCC unroll 4
      for (int r = 0; r < kVectors; ++r) t[i][r] = _mm512_fmadd_ps(sum_term[r], _mm512_set1_ps(task.sum), t[i][r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kVectors; ++r) {
      _mm512_storeu_ps(y + r * kLanes, scales.finish(r, t[i][r], _mm512_loadu_ps(y + r * kLanes)));
    }
  }
}

// A table is four loads, two row blocks share them where their sums fit the registers.
template <Accuracy kAccuracy>
void add_span(const ByteTask& task) {
  constexpr bool kWide = kAccuracy == Accuracy::kNearExact;
  if (task.blocks == 1) return add_blocks<kAccuracy, 1, 4>(task);
  if (task.weight->bits <= (kWide ? 2 : 4)) return add_blocks<kAccuracy, 2, kWide ? 2 : 4>(task);
  for (int i = 0; i < 2; ++i) {
    ByteTask one = task;
    one.blocks = 1;
    one.pieces[0] = task.pieces[i];
    one.y += i * kByteRows;
    add_blocks<kAccuracy, 1, 4>(one);
  }
}

}  // namespace

SpanSums span_sums(const float* x, int64_t slices) {
  const __m512 sign = _mm512_set1_ps(-0.0f);
  __m512 sum = _mm512_setzero_ps(), total = sum, largest = sum;
  for (int64_t i = 0; i < slices * 8; i += kLanes) {
    const __m512 v = _mm512_loadu_ps(x + i), size = _mm512_andnot_ps(sign, v);
    sum = _mm512_add_ps(sum, v);
    total = _mm512_add_ps(total, size);
    __m512 slice = _mm512_add_ps(size, _mm512_shuffle_f32x4(size, size, 0xB1));
    slice = _mm512_add_ps(slice, _mm512_permute_ps(slice, 0x4E));
    slice = _mm512_add_ps(slice, _mm512_permute_ps(slice, 0xB1));
    largest = _mm512_max_ps(largest, slice);
  }
  const float all = _mm512_reduce_add_ps(total);
  return {_mm512_reduce_add_ps(sum), all, _mm512_reduce_max_ps(largest) + all * 0.0f};
}

void build_byte_tables(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                       float* step) {
  // What fits: one entry in its bits, or the sum of all, each rounded, in 16.
  const bool sum_fits = accuracy == Accuracy::kAccurate;
  const int half = accuracy == Accuracy::kFast ? 128 : 32768;
  const float range = sum_fits ? 32767.0f - float(slices) : float(half) - 0.0625f;
  const float inverse = inverse_step(range, sum_fits ? sums.total : sums.largest, step);

  // Entry h * 16 + l = +-x0 +-x1 +-x2 +-x3 by the bits of l, +-x4 +-x5 +-x6 by those of h, + x7.
  const __m512 sign[4] = {sign_of_bit(0), sign_of_bit(1), sign_of_bit(2), sign_of_bit(3)};
  const __m512i bias = _mm512_set1_epi32(sum_fits ? 0 : half);
  for (int64_t j = 0; j < slices; ++j, x += 8) {
    __m512 term[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) term[i] = _mm512_xor_ps(_mm512_set1_ps(x[i] * inverse), sign[i]);
    const __m512 low = _mm512_add_ps(_mm512_add_ps(term[0], term[1]), _mm512_add_ps(term[2], term[3]));
    __m512 high = _mm512_set1_ps(x[7] * inverse);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) high = _mm512_add_ps(high, _mm512_xor_ps(_mm512_set1_ps(x[4 + i] * inverse), sign[i]));
    __m512i entry[8];
#pragma GCC unroll 8
    for (int h = 0; h < 8; ++h) {
      const __m512 sum = _mm512_add_ps(low, _mm512_permutexvar_ps(_mm512_set1_epi32(h), high));
      entry[h] = _mm512_add_epi32(_mm512_cvt_roundps_epi32(sum, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC), bias);
    }
#pragma GCC unroll 2
    for (int half_table = 0; half_table < 2; ++half_table) {
      __m512i byte0, byte1;
      pick_bytes<0>(entry + 4 * half_table, &byte0, &byte1);
      if (accuracy == Accuracy::kFast) {
        _mm512_store_si512(tables + 64 * half_table, byte0);
      } else {
        _mm512_store_si512(tables + 64 * half_table, byte1);
        _mm512_store_si512(tables + kEntries + 64 * half_table, byte0);
      }
    }
    tables += byte_table_bytes(accuracy);
  }
}

void add_byte_span(Accuracy accuracy, const ByteTask& task) {
  switch (accuracy) {
    case Accuracy::kFast:
      return add_span<Accuracy::kFast>(task);
    case Accuracy::kAccurate:
      return add_span<Accuracy::kAccurate>(task);
    default:
      return add_span<Accuracy::kNearExact>(task);
  }
}

}  // namespace lutgemm::vbmi
LUTGEMM_TARGET_END
#endif
