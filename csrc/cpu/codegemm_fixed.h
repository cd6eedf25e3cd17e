// CodeGEMM with fixed-point tables: the Psumbook of a tile as integers of 8, 14 or 16 bits, in planes of bytes that the
// look-up instructions of a CPU take 64 at a time. One token at a time, so its result depends on no other token.
//
// Entries of a tile are of one or two classes, by the bound |x_j| * C of their products, where |x_j| is the norm of the
// vector of x and C the largest norm of a centroid of the codebook. Where that helps, those of bounds far below the
// largest one are a class of their own: next to an outlier of x the others keep a fine step. With B the largest bound
// of a class:
//
//   ci    = round(c / uc)          int16, uc = largest value of the codebook / 32767, made by the pack
//   xi[k] = round(x[k] / ux)       int16, ux = B / (L * uc), L = 2^30 - 2^19
//   P     = sum over d of ci * xi  int32, within +-2^30 by Cauchy and Schwarz, roundings of xi included
//   T     = floor((P + 2^30) / 2^(31 - bits) + 1/2)    unsigned, `bits` bits, the table entry
//   psum ~ (T - 2^(bits - 1)) * step,  step = B / L * 2^(31 - bits)
//
// L leaves room for half a unit of T too where that is more. At 16 bits roundings to int16 would show: there P is made
// in fp32 from c and x * (1 - 2^-14) / B, and T is read off the mantissa of P + 3.
//
// T are added as integers, without error. So for each token and row the error, before y's own fp32 arithmetic, is at
// most the sum over look-ups of |scale| times
//
//   step / 2  +  uc / 2 * sum |x|  +  ux / 2 * sum |c|  +  vec_len * ux * uc / 4
//
// with sums over the vec_len components. The first term, 2^-bits * B, is the largest; the others are about 2^-16 * B.
#pragma once

#include "codebook.h"

namespace lutgemm {

// Makes the tables of `entries` entries, the first of which is codebook `first_codebook` of the first vector of x.
struct FixedBuildArgs {
  const RoundedCodebooks* rounded;  // followed, after 64 bytes, by int16 [num_codebooks][vec_len / 2][256][2]
  const float* codebooks;           // [num_codebooks][vec_len][256]
  const float* x;                   // of whole vectors
  int entries;
  int first_codebook;
  int num_codebooks, vec_len;
  int used_entries;  // 1 << codebook_bits, the part of a table that is made
  uint8_t* tables;   // [entries][planes][256], in the order of FixedTables
};

// One token's tables of a tile.
struct FixedTables {
  int classes;
  int count[2];                  // entries of each class
  float step[2];                 // NaN when x or the codebooks are not finite
  uint16_t order[kTileEntries];  // the entry of each table, class after class
};

// Adds the looked-up values of one class of entries and one block to the sums of its rows.
struct FixedGatherArgs {
  const uint8_t* codes;   // [entries of the tile][kBlockRows]
  const uint8_t* next;    // in the stream of codes, to prefetch as many bytes from as are used here; may lie beyond it
  const uint8_t* tables;  // of the class
  const uint16_t* order;  // the entry of each table
  float step;
  int entries;  // of the class
  int used_entries;
  bool first;          // of the group: no partial sum yet
  bool last;           // of the group: y += scale * sum, else the sum becomes the partial sum
  float* partial;      // [kBlockRows]
  float* y;            // [kBlockRows]
  const void* scales;  // [kBlockRows], read when `last`
  DType scale_dtype;
};

struct FixedKernel {
  int table_bytes;
  void (*build)(const FixedBuildArgs&, FixedTables&);
  void (*gather)(const FixedGatherArgs&);
};

extern const FixedKernel kFixedVbmi8, kFixedVbmi14, kFixedVbmi16;

// The kernel for this weight at this accuracy, or null where fp32 tables are the way.
const FixedKernel* fixed_kernel(const PackedLayout& p, Isa isa, Accuracy accuracy);

void codegemm_fixed(const PackedLayout& p, const void* packed, const Io& io, Isa isa, const FixedKernel& kernel,
                    int64_t block_begin, int64_t block_end);

}  // namespace lutgemm
