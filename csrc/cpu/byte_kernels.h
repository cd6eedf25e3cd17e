// What the kernels over byte_layout.h are given and add up, and the drivers that call them.
//
// With AVX-512 VBMI, lut_gemm looks up a whole code byte, one token at a time: 8 signs, 128 entries by symmetry, in
// four registers at 12 or 16 bits. With AVX2, AVX-512 and NEON it looks up nibbles: 4 signs, 16 entries
// (byte_nibble.h). biqgemm with AVX-512 cuts three code bytes into four indices of 6 bits for several tokens at once:
// its 64 entries of 16 bits fill two registers and need no sign, and unpacking the indices is shared by the tokens
// (byte_words.h). Without VBMI this is also lut_gemm's way to accurate results. On AVX2 and NEON both algorithms are
// one kernel. Other CPUs have no look-up in a register, and 256 entries of fp32 in L1 take as many loads as 256
// integers: fp32 serves them at every accuracy.
//
// Entries are fixed-point numbers: multiples of a step, one for each span and token. With A the largest sum of |x| over
// the 8 k of a look-up, or the 4 of a nibble, S the sum of |x| over the span, and n look-ups in it, a dot product over
// 16 slices is wrong by at most n step / 2:
//
//   accuracy     limited by                          step               lut_gemm     biqgemm      nibbles
//   fast         entries of 8 bits                   A / 128            A / 16       as accurate  A / 8
//   accurate     their sum in 16 bits                S / (32767 - n)    S / 4094     S / 2976     S / 2046
//   near-exact   entries of 16 bits, summed apart    A / 32768          A / 4096     as lut_gemm  A / 2048
//
// (where one entry is the limit, 1/16 step is left for fp32 rounding). lut_gemm's entry e = floor(v / step) stands for
// (e + 1/2) * step, so that the bitwise complement is its exact negative; other ones are rounded to nearest. Sums
// within a span are integers, hence exact; then fp32: y += step * (sum over b of scale[b] * dot[b]), spans in order. So
// a result depends neither on threads nor on the other tokens.
//
// The range of x is narrower than that of fp32. Where the bound of the step (S when accurate, else A) is below 7.7e-34,
// the span's look-ups count as zero; where S is above 3.4e38, the largest fp32, results are NaN.
#pragma once

#include <cstdint>

#include "bcq.h"
#include "byte_layout.h"
#include "scratch.h"

namespace lutgemm {

// Look-ups of 6 k in a span of `slices` code bytes, and in a full one.
constexpr int64_t word_look_ups(int64_t slices) { return slices / 3 * 4 + (slices % 3 ? slices % 3 + 1 : 0); }
constexpr int64_t kSpanWordLookUps = word_look_ups(kSpanSlices);
constexpr int64_t kWordEntries = 64;
constexpr int64_t kWordTableFeatures = kSpanWordLookUps * 6;  // x that the tables of a span read, zeros beyond it

constexpr int64_t byte_table_bytes(Accuracy accuracy) { return accuracy == Accuracy::kFast ? 128 : 256; }

// The part of one or two row blocks in a span, one token: y [blocks][64] += ...
struct ByteTask {
  const PackedBytes* weight;
  int blocks;
  Piece pieces[2];
  int64_t slices;
  const uint8_t* tables;  // [slices][table_bytes]
  float step, sum;        // of the entries; of x over the span
  float* y;
};

// One row block's part of a span, several tokens: y [tokens][64] += ...
struct WordTask {
  const PackedBytes* weight;
  Piece piece;
  const uint8_t* ahead;  // a piece that is read soon
  int64_t ahead_bytes;
  int64_t slices, tokens;
  const int16_t* tables;      // [tokens][kSpanWordLookUps][kWordEntries]
  const float *steps, *sums;  // [tokens]
  float* y;
};

// range / bound, and its reciprocal in `step`. Bounds so small that this overflows count as zero.
float inverse_step(float range, float bound, float* step);

// x [slices * 8, and zeros up to a multiple of 16] of a span.
struct SpanSums {
  float sum;      // of x
  float total;    // of |x|
  float largest;  // of |x| over the k of a look-up; NaN where any x is not finite
};

namespace vbmi {
SpanSums span_sums(const float* x, int64_t slices);

// x [slices * 8] -> tables [slices][byte_table_bytes] and their step.
void build_byte_tables(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                       float* step);
void add_byte_span(Accuracy accuracy, const ByteTask& task);

void add_word_span(const WordTask& task);
}  // namespace vbmi

// A slice's two tables of nibbles, [low, high nibble]{ fast: [16]; other: low bytes [16], high bytes [16] }.
constexpr int64_t nibble_table_bytes(Accuracy accuracy) { return accuracy == Accuracy::kFast ? 32 : 64; }

namespace avx2 {
SpanSums nibble_span_sums(const float* x, int64_t slices);
void build_nibble_tables(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                         float* step);
void add_nibble_span(Accuracy accuracy, const ByteTask& task);
}  // namespace avx2
namespace avx512 {
void add_nibble_span(Accuracy accuracy, const ByteTask& task);  // tables as for AVX2

// x [kWordTableFeatures] -> tables [word_look_ups(slices)][kWordEntries] and their step.
void build_word_tables(const float* x, int64_t slices, const SpanSums& sums, int16_t* tables, float* step);
void add_word_span(const WordTask& task);
}  // namespace avx512
namespace neon {
SpanSums nibble_span_sums(const float* x, int64_t slices);
void build_nibble_tables(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                         float* step);
void add_nibble_span(Accuracy accuracy, const ByteTask& task);
}  // namespace neon

// What one instruction set brings. Codes are read folded or plain.
struct ByteKernels {
  bool folded;
  int64_t (*table_bytes)(Accuracy accuracy);
  SpanSums (*span_sums)(const float* x, int64_t slices);
  void (*build_tables)(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                       float* step);
  void (*add_span)(Accuracy accuracy, const ByteTask& task);

  // Null where biqgemm has no kernel of its own.
  void (*build_words)(const float* x, int64_t slices, const SpanSums& sums, int16_t* tables, float* step);
  void (*add_words)(const WordTask& task);
};

// Null for an instruction set without integer tables.
const ByteKernels* byte_kernels(Isa isa);

// Whether look-ups of 6 k serve these. Without VBMI they also beat 16-bit nibbles for one token (1.4 times, hot, Zen
// 4), but not nibbles of 8 bits.
inline bool uses_words(Isa isa, Accuracy accuracy, bool biqgemm) {
  const ByteKernels* kernels = byte_kernels(isa);
  if (kernels == nullptr || kernels->add_words == nullptr || accuracy >= Accuracy::kNearExact) return false;
  return biqgemm || (!kernels->folded && accuracy == Accuracy::kAccurate);
}

// The tables of some tokens, all of K, in the calling thread's memory: filled span by span, read by all threads.
struct ByteTokens {
  Isa isa;
  int64_t first, count;  // tokens first .. first + count - 1
  int64_t table_stride;  // bytes from token to token
  uint8_t* tables;       // [span][token]{ tables [16][table_bytes], or word tables }
  float *steps, *sums;   // [span][token]
  Scratch<uint8_t> large;

  const uint8_t* tables_of(int64_t span) const { return tables + span * count * table_stride; }
};

constexpr int64_t kByteTokens = 4;   // tokens that lut_gemm takes past a span's codes while they are in L1
constexpr int64_t kWordTokens = 16;  // tokens of a pass of biqgemm: y of 4096 rows takes 256 KiB of L2

ByteTokens make_byte_tokens(const PackedBytes& weight, Isa isa, Accuracy accuracy, bool words, int64_t first,
                            int64_t count);

// Tables of spans [begin, end).
void prepare_spans(const PackedBytes& weight, Accuracy accuracy, bool words, const Io& io, int64_t begin, int64_t end,
                   ByteTokens& tokens);

// y of the tokens, chunks [begin, end). biqgemm_chunks: of kernels that have words.
void lut_gemm_chunks(const PackedBytes& weight, Accuracy accuracy, const Io& io, const ByteTokens& tokens,
                     int64_t begin, int64_t end);
void biqgemm_chunks(const PackedBytes& weight, const Io& io, const ByteTokens& tokens, int64_t begin, int64_t end);

}  // namespace lutgemm
