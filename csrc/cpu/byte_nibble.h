// BCQ by look-ups of nibbles, for any vector unit that looks up bytes in a table of 16: one or two row blocks, one
// span, one token. Included inside a target region, hence in an unnamed namespace and with no include guard; its own
// includes, and the intrinsics, must have been seen before the region.
//
//   index   rows' code bytes of one slice and plane: the low 4 bits, then the high 4 bits
//   look up low and high byte of 16 entries of 16 bits, one table in each lane of 16 bytes
//   add     the sum of entries fits 16 bits (accurate), so of the high bytes' sum 8 bits are enough: bytes added as
//           bytes. Low bytes go into a ByteSum, which loses nothing.
//           near-exact: the high bytes too, and their 24 bits meet in fp32. fast: there are high bytes only.
//
// That is 15 operations for the 8 signs of a vector of rows, four of them shuffles; interleaving the bytes to 16-bit
// entries takes 15 as well, but eight shuffles, and most CPUs have fewer ports for those than for the rest.
//
// `V` names a vector of kBytes bytes, of half as many words, and of a quarter as many fp32:
//   Bytes, load, table (16 bytes, repeated), low_nibbles, high_nibbles, look_up, set_bytes, add_bytes
//   Words, add_words; shifted (bytes << 8, two vectors, in the order of row_of_byte's first round of interleaving)
//   ByteSum: clear, add, words (two vectors, in that order)
//   Floats, floats (two vectors of unsigned words, less a bias, to four vectors of rows), set, load_floats, store,
//   load_scales, load_bytes, add, sub, mul, fma
#include <cmath>

#include "byte_kernels.h"

namespace lutgemm {
namespace {

// How far ahead the stream is prefetched, into L2.
constexpr int64_t kPrefetchBytes[] = {16 << 10, 12 << 10};

// Twice, since some are dropped (byte_lut_vbmi.cpp): AVX-512, 3 bits, "fast", 255 us in place of 312. Always inlined:
// gcc takes a function of prefetches for one without effect, and leaves out calls of it.
[[gnu::always_inline]] inline void prefetch(const uint8_t* at) {
  for (const int64_t ahead : kPrefetchBytes) __builtin_prefetch(at + ahead, 0, 2);
}

// The tables of a slice's two nibbles.
template <class V, Accuracy kAccuracy>
struct NibbleTables {
  typename V::Bytes low[2], high[2];

  explicit NibbleTables(const uint8_t* tables) {
    for (int i = 0; i < 2; ++i) {
      if constexpr (kAccuracy == Accuracy::kFast) {
        high[i] = V::table(tables + 16 * i);
      } else {
        low[i] = V::table(tables + 32 * i);
        high[i] = V::table(tables + 32 * i + 16);
      }
    }
  }
};

// The dot products of one plane, in steps. rows: of `look_ups` look-ups.
template <class V, Accuracy kAccuracy>
struct NibbleDot;

template <class V>
struct NibbleDot<V, Accuracy::kFast> {
  typename V::ByteSum high;

  void clear() { high.clear(); }
  void add(const NibbleTables<V, Accuracy::kFast>& t, typename V::Bytes codes) {
    high.add(V::look_up(t.high[0], V::low_nibbles(codes)));
    high.add(V::look_up(t.high[1], V::high_nibbles(codes)));
  }
  void rows(float look_ups, typename V::Floats (&out)[4]) const {
    typename V::Words words[2];
    high.words(words);
    V::floats(words, 128.0f * look_ups, out);
  }
};

template <class V>
struct NibbleDot<V, Accuracy::kAccurate> {
  typename V::ByteSum low;
  typename V::Bytes high;

  void clear() {
    low.clear();
    high = V::set_bytes(0x80);
  }
  void add(const NibbleTables<V, Accuracy::kAccurate>& t, typename V::Bytes codes) {
    const typename V::Bytes nibbles[2] = {V::low_nibbles(codes), V::high_nibbles(codes)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      low.add(V::look_up(t.low[i], nibbles[i]));
      high = V::add_bytes(high, V::look_up(t.high[i], nibbles[i]));
      V::keep(high);
    }
  }
  void rows(float, typename V::Floats (&out)[4]) const {
    typename V::Words words[2], tops[2];
    low.words(words);
    V::shifted(high, tops);
    for (int i = 0; i < 2; ++i) words[i] = V::add_words(words[i], tops[i]);
    V::floats(words, 32768.0f, out);
  }
};

template <class V>
struct NibbleDot<V, Accuracy::kNearExact> {
  typename V::ByteSum low, high;

  void clear() {
    low.clear();
    high.clear();
  }
  void add(const NibbleTables<V, Accuracy::kNearExact>& t, typename V::Bytes codes) {
    const typename V::Bytes nibbles[2] = {V::low_nibbles(codes), V::high_nibbles(codes)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      low.add(V::look_up(t.low[i], nibbles[i]));
      high.add(V::look_up(t.high[i], nibbles[i]));
    }
  }
  void rows(float look_ups, typename V::Floats (&out)[4]) const {
    typename V::Words words[2];
    typename V::Floats tail[4];
    low.words(words);
    V::floats(words, 0.0f, tail);
    high.words(words);
    V::floats(words, 128.0f * look_ups, out);
    for (int r = 0; r < 4; ++r) out[r] = V::fma(out[r], V::set(256.0f), tail[r]);
  }
};

// The scales of one row block and group. `row` counts from the start of the block.
template <class V>
struct NibbleScales {
  using Floats = typename V::Floats;

  const PackedBytes& weight;
  const uint8_t* data;

  bool has_sum_term() const { return weight.uniform || weight.has_offsets; }

  // What dot[b] is multiplied by; uniform: before s.
  Floats plane(int b, int64_t row) const {
    if (weight.uniform) return V::set(std::ldexp(1.0f, weight.bits - 2 - b));
    return V::load_scales(data, weight.scale_dtype, b * kByteRows + row);
  }

  // What the sum of x is multiplied by; uniform: before s.
  Floats sum_term(int64_t row) const {
    if (!weight.uniform) return V::load_scales(data, weight.scale_dtype, weight.bits * kByteRows + row);
    const uint8_t* zeros = data + kByteRows * (weight.scale_dtype == DType::kFloat32 ? 4 : 2);
    const Floats middle = V::set(float((1 << weight.bits) - 1) / 2);
    if (weight.zeros_dtype == DType::kUInt8) return V::sub(middle, V::load_bytes(zeros + row));
    return V::sub(middle, V::load_scales(zeros, weight.zeros_dtype, row));
  }

  // y + t (uniform: y + s * t)
  Floats finish(int64_t row, Floats t, Floats y) const {
    return weight.uniform ? V::fma(V::load_scales(data, weight.scale_dtype, row), t, y) : V::add(y, t);
  }
};

// Vector r of rows that part `part` of a block's bytes holds starts at this row.
template <class V>
constexpr int64_t row_of(int part, int r) {
  return 16 * r + part * (V::kBytes / 4);
}

// t [block][64] += scale * dot of planes first .. first + kPlanes - 1.
template <class V, Accuracy kAccuracy, int kPlanes, int kBlocks>
inline void add_planes(const ByteTask& task, int block, int first, float (*t)[kByteRows]) {
  constexpr int kParts = int(kByteRows) / V::kBytes;
  NibbleDot<V, kAccuracy> dot[kBlocks][kPlanes][kParts];
  for (auto& of_block : dot) {
    for (auto& of_plane : of_block) {
      for (auto& d : of_plane) d.clear();
    }
  }
  const int64_t slice_bytes = task.weight->bits * kByteRows;
  const uint8_t* tables = task.tables;
  for (int64_t j = 0; j < task.slices; ++j, tables += nibble_table_bytes(kAccuracy)) {
    const NibbleTables<V, kAccuracy> table(tables);
#pragma GCC unroll 2
    for (int i = 0; i < kBlocks; ++i) {
      const uint8_t* codes = task.pieces[block + i].codes + first * kByteRows + j * slice_bytes;
#pragma GCC unroll 2
      for (int p = 0; p < kPlanes; ++p, codes += kByteRows) {
        prefetch(codes);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          dot[i][p][part].add(table, V::load(codes + part * V::kBytes));
        }
      }
    }
  }
  const float look_ups = float(2 * task.slices);
#pragma GCC unroll 2
  for (int i = 0; i < kBlocks; ++i) {
    const NibbleScales<V> scales{*task.weight, task.pieces[block + i].scales};
#pragma GCC unroll 2
    for (int p = 0; p < kPlanes; ++p) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        typename V::Floats rows[4];
        dot[i][p][part].rows(look_ups, rows);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const int64_t row = row_of<V>(part, r);
          V::store(t[i] + row, V::fma(scales.plane(first + p, row), rows[r], V::load_floats(t[i] + row)));
        }
      }
    }
  }
}

template <class V, Accuracy kAccuracy, int kBlocks>
void add_blocks(const ByteTask& task, int block) {
  const PackedBytes& weight = *task.weight;
  alignas(64) float t[kBlocks][kByteRows] = {};
  for (int i = 0; i < kBlocks; ++i) {
    for (int64_t at = 0; at < weight.scale_bytes; at += 64) prefetch(task.pieces[block + i].scales + at);
  }
  int b = 0;
  for (; b + V::kPlanes <= weight.bits; b += V::kPlanes)
    add_planes<V, kAccuracy, V::kPlanes, kBlocks>(task, block, b, t);
  if (b < weight.bits) add_planes<V, kAccuracy, 1, kBlocks>(task, block, b, t);
  for (int i = 0; i < kBlocks; ++i) {
    const NibbleScales<V> scales{weight, task.pieces[block + i].scales};
    for (int64_t row = 0; row < kByteRows; row += V::kBytes / 4) {
      float* y = task.y + (block + i) * kByteRows + row;
      typename V::Floats v = V::mul(V::load_floats(t[i] + row), V::set(task.step));
      if (scales.has_sum_term()) v = V::fma(scales.sum_term(row), V::set(task.sum), v);
      V::store(y, scales.finish(row, v, V::load_floats(y)));
    }
  }
}

template <class V, Accuracy kAccuracy>
void add_span(const ByteTask& task) {
  int block = 0;
  for (; block + V::kBlocks <= task.blocks; block += V::kBlocks) add_blocks<V, kAccuracy, V::kBlocks>(task, block);
  for (; block < task.blocks; ++block) add_blocks<V, kAccuracy, 1>(task, block);
}

template <class V>
void add_span_of(Accuracy accuracy, const ByteTask& task) {
  switch (accuracy) {
    case Accuracy::kFast:
      return add_span<V, Accuracy::kFast>(task);
    case Accuracy::kAccurate:
      return add_span<V, Accuracy::kAccurate>(task);
    default:
      return add_span<V, Accuracy::kNearExact>(task);
  }
}

// The step's reciprocal times x gives entries that fit: one in its bits, or the sum of all, each rounded, in 16.
inline float nibble_step(Accuracy accuracy, int64_t slices, const SpanSums& sums, float* step) {
  if (accuracy == Accuracy::kAccurate) return inverse_step(32767.0f - float(2 * slices), sums.total, step);
  return inverse_step((accuracy == Accuracy::kFast ? 127.5f : 32767.5f) - 0.0625f, sums.largest, step);
}

}  // namespace
}  // namespace lutgemm
