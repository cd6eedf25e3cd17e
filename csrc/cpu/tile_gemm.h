// BCQ for many tokens: tiles of W dequantized to 16-bit integers in L1, and multiplied there (AVX-512 VBMI, VNNI).
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
//              |w| at most          unit                step                     wrong by at most
//   uniform    255                  s                   A / 32767                step / 2 * sum over k of |W - offset|
//   free       kMostFree = 8191     V / (8191 - P / 2)  max(A / 32767, S / 262000)
//                                                       step / 2 * sum over k of |W| + unit * P / 2 * S
//
// because 128 * 32767 * 255 < 2^31, and 8191 * (262000 + 128 / 2) < 2^31: each of 128 activations may round up by 1/2.
// Rounding has no sign, so the root mean square of errors is far less: 1e-4 to 2e-4 of y for normal x, with or without
// outliers. `sum` is the sum of the rounded activations, so that what the zero of a weight takes away has their errors.
#pragma once

#include <cstdint>

#include "byte_layout.h"
#include "scratch.h"

namespace lutgemm {

constexpr int64_t kTileFeatures = kSpanSlices * 8;  // k of a tile
constexpr int64_t kTileTokens = 256;                 // tokens of a pass: they share the tiles, y of a chunk is in L2
constexpr int64_t kMostRounded = 32767;             // |q|
constexpr int64_t kMostUniform = 255, kMostFree = 8191;  // |w|
constexpr int64_t kMostFreeSum = 262000;            // sum of |q| over a span, but for its rounding
static_assert(kTileFeatures * kMostRounded * kMostUniform < int64_t(1) << 31, "sums of the uniform kind fit 32 bits");
static_assert((kMostFreeSum + kTileFeatures / 2) * kMostFree < int64_t(1) << 31, "sums of the free kind fit 32 bits");

// The activations of some tokens as integers, in the calling thread's memory: filled span by span, read by all threads.
struct TileTokensX {
  int64_t first, count;  // tokens first .. first + count - 1
  int16_t* q;            // [span][token][kTileFeatures], zeros beyond the span
  float *steps, *sums;   // [span][token]
  Scratch<uint8_t> large;
};

TileTokensX make_tile_tokens(const PackedBytes& weight, int64_t first, int64_t count);

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
  const int16_t* q;           // [tokens][kTileFeatures]
  const float *steps, *sums;  // [tokens]
  float* y;
};

namespace vbmi {
// x [kTileFeatures] -> q, its step and the sum of what q stands for.
void round_activations(bool uniform, const float* x, int16_t* q, float* step, float* sum);
void add_tile(const TileTask& task);
}  // namespace vbmi

}  // namespace lutgemm
