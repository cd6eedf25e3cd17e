// BCQ on the CPU: the prepared layout, and what each instruction set provides.
//
//   y[m, n] = sum over g of ( offset[n, g] * sum(x of g) + sum over b of scale[b, n, g] * dot[b, n, g] ) + bias[n]
//   dot[b, n, g] = sum over the k of g of sign(b, n, k) * x[m, k]            looked up, never multiplied
//
// Kernels with fp32 tables add in one order: from 0, or from the offset term, the planes of a group in turn; then the
// group to y. Within dot k rises, a table at a time. So results depend neither on threads, nor on the number of tokens,
// nor on whether lut_gemm or biqgemm is asked for; and AVX2 and AVX-512, whose tables are of 4 k, give the same bits.
// The scalar kernels' tables are of 8 k, and they round products before they add them: their last bits differ. Integer
// tables: byte_kernels.h.
#pragma once

#include <cstdint>

#include "../params.h"
#include "scratch.h"

namespace lutgemm {

constexpr int64_t kRowBlock = 64;  // rows that kernels take at once; N is padded to a multiple
constexpr int kMaxBits = 8;

// A prepared weight: a header of kPackedHeaderBytes, then, strictly in the order in which lut_gemm reads it,
//
//   [row block of 64][group] { scales [bits][64], offsets [64] if any         of scale_dtype
//                              or, uniform: s [64] of scale_dtype, c [64] fp32
//                              code words [word of the group][bits][64]       uint32 }
//
// c = (2^bits - 1) / 2 - zero. A code word holds 32 consecutive k of one row and plane, lowest bit first, so that the
// 16 words of a vector are 16 rows' indices into one table. Rows beyond N and bits beyond K are zero.
// kPackedTailBytes of zeros end it.
struct PackedBcq {
  int64_t N, K, G, words, group_size;
  int bits;
  bool uniform, has_offsets;
  DType scale_dtype;
  int64_t row_blocks;       // ceil(N / 64)
  int64_t words_per_group;  // the last group may have fewer
  int64_t scale_bytes;      // in front of the code words of a group
  int64_t group_bytes;      // of a full group
  int64_t block_bytes;      // of a row block, all groups
  const uint8_t* blocks;

  int64_t words_in_group(int64_t g) const {
    const int64_t left = words - g * words_per_group;
    return left < words_per_group ? left : words_per_group;
  }
  const uint8_t* group(int64_t row_block, int64_t g) const {
    return blocks + row_block * block_bytes + g * group_bytes;
  }
  const uint32_t* codes(const uint8_t* group) const { return reinterpret_cast<const uint32_t*>(group + scale_bytes); }
};

// Asks for as many bytes at `ahead` as a group has scales. Kernels ask for code words as they go, so that together
// every line is asked for: one left out costs a whole DRAM latency, and the scales are a line or more in every group.
// Always inlined: gcc takes a function of prefetches for one without effect, and leaves out calls of it.
[[gnu::always_inline]] inline void prefetch_scales(const PackedBcq& weight, const uint8_t* ahead) {
  for (int64_t at = 0; at < weight.scale_bytes; at += 64) __builtin_prefetch(ahead + at, 0, 2);
}

constexpr int64_t kPackedHeaderBytes = 64;

// Zeros behind the blocks: kernels load code words from up to 3 bytes further on.
constexpr int64_t kPackedTailBytes = 64;

// The layout of a weight of these sizes; `blocks` is null.
PackedBcq packed_layout(int64_t N, int64_t K, int64_t group_size, int bits, bool uniform, bool has_offsets,
                        DType scale_dtype);

// Header and blocks together.
int64_t packed_bytes(const PackedBcq& layout);

void write_packed_header(const PackedBcq& layout, uint8_t* packed);

// Values [N, G] of group g for the kRowBlock rows from `row`, those beyond N zero -> out; returns its end.
uint8_t* pack_column(const BcqWeight& weight, const void* source, DType dtype, int64_t row, int64_t g, uint8_t* out);

// Fills row blocks [begin, end) of `packed`.
void pack_row_blocks(const BcqWeight& weight, const PackedBcq& layout, int64_t begin, int64_t end, uint8_t* packed);

// Reads a header that may hold anything. Null, or why `packed` is not a prepared weight of `bytes` bytes.
const char* parse_packed(const uint8_t* packed, int64_t bytes, PackedBcq* layout);

// What one instruction set brings. tables: of 32 consecutive k, `table_floats` floats. y: [tokens][64], added to.
struct LutKernels {
  int64_t table_floats;
  int64_t tile_tokens;  // tokens that share a tile of tables
  int64_t tile_bytes;   // of tables kept stationary by biqgemm

  // x [words * 32] -> tables [words][table_floats].
  void (*build_tables)(const float* x, int64_t words, float* tables);

  // One token: all groups of a row block. tables [words][table_floats], sums [G].
  void (*lut_gemm_block)(const PackedBcq& weight, int64_t row_block, const float* tables, const float* sums, float* y);

  // Groups [begin, end) of a row block, `tokens` tokens. tables and sums start at group `begin` and lie
  // `table_stride` and `sum_stride` floats apart from token to token.
  void (*biqgemm_block)(const PackedBcq& weight, int64_t row_block, int64_t begin, int64_t end, int64_t tokens,
                        const float* tables, int64_t table_stride, const float* sums, int64_t sum_stride, float* y);
};

namespace scalar {
void build_tables(const float* x, int64_t words, float* tables);
void lut_gemm_block(const PackedBcq&, int64_t, const float*, const float*, float*);
void biqgemm_block(const PackedBcq&, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t,
                   float*);
}  // namespace scalar
namespace avx2 {
void build_tables(const float* x, int64_t words, float* tables);
void lut_gemm_block(const PackedBcq&, int64_t, const float*, const float*, float*);
void biqgemm_block(const PackedBcq&, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t,
                   float*);
}  // namespace avx2
namespace avx512 {
void build_tables(const float* x, int64_t words, float* tables);
void lut_gemm_block(const PackedBcq&, int64_t, const float*, const float*, float*);
void biqgemm_block(const PackedBcq&, int64_t, int64_t, int64_t, int64_t, const float*, int64_t, const float*, int64_t,
                   float*);
}  // namespace avx512

const LutKernels& lut_kernels(Isa isa);

// The tables of one token, all of K: filled by `prepare_words`, read by `lut_gemm_rows`.
struct TokenTables {
  Scratch<float> x, tables, sums;  // [words * 32], [words][table_floats], [G]
};
TokenTables make_token_tables(const PackedBcq& weight, Isa isa);

// Token m, words [begin, end): x to fp32 and the tables. All words have to be done before `prepare_sums`.
void prepare_words(const PackedBcq& weight, Isa isa, const Io& io, int64_t m, int64_t begin, int64_t end,
                   TokenTables& token);
void prepare_sums(const PackedBcq& weight, TokenTables& token);

// y of token m, row blocks [begin, end).
void lut_gemm_rows(const PackedBcq& weight, Isa isa, const Io& io, int64_t m, const TokenTables& token, int64_t begin,
                   int64_t end);

// y of all tokens, row blocks [begin, end).
void biqgemm_rows(const PackedBcq& weight, Isa isa, const Io& io, int64_t begin, int64_t end);

// x of the group's words (zeros beyond K) -> its sum, in one fixed order.
float group_sum(const float* x, int64_t words);

// y64 + bias -> y[m, row block] in io.dtype.
void write_row_block(int64_t N, Isa isa, const Io& io, int64_t m, int64_t row_block, const float* y64);

// W rows [begin, end) in `dtype` -> out [end - begin, K].
void bcq_dequantize_rows(const BcqWeight& weight, Isa isa, int64_t begin, int64_t end, DType dtype, void* out);

// One row of W by its group constants. base [G] and scales [bits][G] are fp32; unit [G] is null or multiplies the sum.
struct DequantizeRow {
  int64_t K, G, words_per_group;
  int bits;
  const uint32_t* codes[kMaxBits];
  const float *base, *scales, *unit;
};
namespace scalar {
void dequantize_row(const DequantizeRow& row, float* out);
}
namespace avx2 {
void dequantize_row(const DequantizeRow& row, float* out);  // out is padded to a multiple of 32
}
namespace avx512 {
void dequantize_row(const DequantizeRow& row, float* out);  // out is padded to a multiple of 32
}

}  // namespace lutgemm
