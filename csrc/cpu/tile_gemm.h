// BCQ for many tokens: tiles of W dequantized to integers in L1, and multiplied there (AVX-512 VBMI and VNNI).
//
//   y[m, n] = sum over spans of unit[n, g] * ( step[m] * sum over k of w[n, k] * q[m, k]  -  zero[n, g] * sum[m] )
//
// A span (byte_layout.h) is up to 128 k of one group. q are activations as integers, multiples of a step of their own
// for each token and span; w are weights as integers, times a unit of their own for each row and group:
//
//   uniform     the stored integers, shifted up to 4 or 8 bits: exact. unit = s, shifted down; zero, shifted up.
//   free        offset + sum over b of +-scale[b], rounded to multiples of unit; zero = 0
//
// Sums of a span are 32-bit integers, hence exact, if they fit. With P pairs of planes, S the sum of |x| over the span,
// A the largest |x|, and V = |offset| + sum over b of |scale[b]|:
//
//             |w| at most       unit               step                     wrong by at most
//   uniform   255               s                  A / 32767                step / 2 * sum over k of |W|
//   free      kMostFree = 8191  V / (8190.5 - P/2) max(A / 32767, S/262000) the same + unit * P/2 * (S + 128 step / 2)
//
// because 128 * 32767 * 255 < 2^31, and 8191 * (262000 + 128 / 2) < 2^31: each of 128 activations may round up by 1/2.
// Errors have either sign, so the root mean square of y's is far less: 3e-5 (uniform) to 2e-4 of y for normal x, with
// or without outliers. `sum` is the sum of the rounded activations: an integer less its zero, not the integer,
// multiplies their errors. As in byte_kernels.h, spans of tiny x count as zero, and ones of huge x are NaN.
#pragma once

#include <cstdint>

#include "byte_layout.h"
#include "scratch.h"

namespace lutgemm {

constexpr int64_t kTileFeatures = kSpanSlices * 8;  // k of a tile
// Tokens of a pass, which share the tiles. With 64 in place of 256, 512 tokens took 1.08 times as long at 3 bits
// and 1.2 times at 8; y of a chunk is 512 KiB.
constexpr int64_t kTileTokens = 256;
constexpr int64_t kMostRounded = 32767;                  // |q|
constexpr int64_t kMostUniform = 255, kMostFree = 8191;  // |w|
constexpr int64_t kMostFreeSum = 262000;                 // sum of |q| over a span, but for its rounding
static_assert(kTileFeatures * kMostRounded * kMostUniform < int64_t(1) << 31, "sums of the uniform kind fit 32 bits");
static_assert((kMostFreeSum + kTileFeatures / 2) * kMostFree < int64_t(1) << 31, "sums of the free kind fit 32 bits");

// "fast" is the same in 8 bits: activations up to 127, with a step for every 32 k, because one outlier makes the step
// of all that share it; weights up to 255, of the free kind as 128 + w with w up to 127, so V / (126.5 - P / 2) is
// their unit.
constexpr int64_t kFastFeatures = 32, kFastSteps = kTileFeatures / kFastFeatures;

// The activations of some tokens as integers, in the calling thread's memory: filled span by span, read by all threads.
struct TileTokensX {
  Accuracy accuracy;
  int64_t first, count;      // tokens first .. first + count - 1
  int64_t q_bytes, q_steps;  // of a token and span
  uint8_t* q;                // [span][token]: int16 or int8 [kTileFeatures], zeros beyond the span
  float* steps;              // [span][token]{ 1, or kFastSteps }
  float* sums;               // [span][token]
  Scratch<uint8_t> large;
};

// accuracy: fast, or accurate, which other ones get as well.
TileTokensX make_tile_tokens(const PackedBytes& weight, Accuracy accuracy, int64_t first, int64_t count);

// Activations of spans [begin, end).
void prepare_tile_spans(const PackedBytes& weight, const Io& io, int64_t begin, int64_t end, TileTokensX& tokens);

// y of the tokens, chunks [begin, end). Codes must be folded.
void tile_gemm_chunks(const PackedBytes& weight, const Io& io, const TileTokensX& tokens, int64_t begin, int64_t end);

// One row block's part of a span, several tokens: y [tokens][64] += ...
struct TileTask {
  const PackedBytes* weight;
  const uint8_t *scales, *codes;
  const uint8_t* ahead;  // a piece that is read soon
  int64_t ahead_bytes;
  int64_t slices, tokens;
  const void* q;              // [tokens][kTileFeatures]
  const float *steps, *sums;  // [tokens]{ 1, or kFastSteps }, [tokens]
  float* y;
};

namespace vbmi {
// x [kTileFeatures] -> q, its steps and the sum of what q stands for.
void round_to_words(bool uniform, const float* x, void* q, float* steps, float* sum);
void round_to_bytes(bool uniform, const float* x, void* q, float* steps, float* sum);
void add_tile_of_words(const TileTask& task);
void add_tile_of_bytes(const TileTask& task);
}  // namespace vbmi

}  // namespace lutgemm
