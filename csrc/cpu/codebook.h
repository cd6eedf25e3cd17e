// Codebook weights on the CPU: the prepared layout, the CodeGEMM driver, and what each instruction set supplies to it.
//
//   W[n, v*j + d] = scales[n, g] * sum over c of codebooks[c, codes[c, n, j], d]
//   y[m, n]       = sum over g of scales[n, g] * sum over j in g, c of psumbook[m, j, c, codes[c, n, j]]
//   psumbook[m, j, c, i] = sum over d of codebooks[c, i, d] * x[m, v*j + d]          (CodeGEMM, NeurIPS 2025, section
//   3)
//
// One "entry" is one (j, c), numbered j * num_codebooks + c: one column of codes and one table of centroid products.
// At Accuracy::kExact tables and sums are fp32. Entries of a group are added in order into a partial sum, which the
// scale then carries into y; no kernel changes that order, so a token's result depends neither on threads nor on the
// tokens beside it. The lower accuracies have fixed-point tables where codegemm_fixed.h has a kernel for them, with the
// same independence; elsewhere they are exact.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace lutgemm {

// Rows of a block. The AVX-512 look-up reads two vectors of 64 codes against one set of table registers.
constexpr int kBlockRows = 128;

// Bytes of fp32 tables of one tile and token that are half of a 32 KiB L1; the other half is for codes and the
// codebook.
constexpr int kTileTableBytes = 16 << 10;

// Entries of a tile where codes are bytes: the two-byte tables of one token are 16 KiB, and a group of 128 weights in
// vectors of 4 is one tile. Kernels with fp32 tables take a tile in two parts.
constexpr int kTileEntries = 32;

// How a prepared weight lies in memory:
//
//   header      int32[16]: magic, layout version, N, K, group_size, num_codebooks, vec_len, codebook_bits, scale dtype,
//               kBlockRows, tile_entries, zeros
//   codebooks   fp32 [num_codebooks][vec_len][table_entries]; entries that codes cannot name are zero
//   rounded     the codebooks as int16 [num_codebooks][vec_len / 2][256][2], after a RoundedCodebooks of 64 bytes; only
//               when codebook_bits <= 8
//   for each group, for each tile of up to tile_entries entries of it, for each block of kBlockRows rows:
//     codes     [entries of the tile][kBlockRows], 1 byte, or 2 when codebook_bits > 8; see row_of_position
//     scales    [kBlockRows] of the stored dtype, in the last tile of a group only
//
// so one thread that takes the tiles in turn, and its range of blocks within each, reads forward only.
struct PackedLayout {
  int64_t N, K, J, G;
  int64_t group_size;
  int64_t group_vectors;  // vectors of a whole group
  int64_t blocks;         // ceil(N / kBlockRows)
  int num_codebooks, vec_len, codebook_bits;
  int code_bytes;     // 1 or 2
  int table_entries;  // floats of one table: 256, or 1 << codebook_bits when that is more
  int tile_entries;   // of a whole tile; it need not hold whole vectors, the partial sums carry over
  DType scale_dtype;
  int scale_bytes;

  int64_t codebook_offset() const { return 64; }
  int64_t rounded_offset() const { return 64 + int64_t(4) * num_codebooks * vec_len * table_entries; }
  int64_t tiles_offset() const {
    return rounded_offset() + (code_bytes == 1 ? 64 + int64_t(2) * num_codebooks * vec_len * table_entries : 0);
  }
  int64_t group_bytes(int64_t entries) const { return blocks * kBlockRows * (entries * code_bytes + scale_bytes); }
  int64_t group_offset(int64_t g) const { return tiles_offset() + g * group_bytes(group_vectors * num_codebooks); }
  int64_t group_entries(int64_t g) const {
    const int64_t left = J - g * group_vectors;
    return (left < group_vectors ? left : group_vectors) * num_codebooks;
  }
  int64_t total_bytes() const { return group_offset(G - 1) + group_bytes(group_entries(G - 1)); }
};

// Codebooks in fixed point: value = integer * unit, each codebook's largest value at 32767.
struct RoundedCodebooks {
  float unit[4];  // NaN when a value is not finite
  float norm[4];  // largest Euclidean norm of a centroid, as value
};

PackedLayout packed_layout(const CodebookWeight& w);

// The row of a block whose code is at `position`. Within 64 rows the order is that in which byte interleaving
// (vpunpck of 4 byte planes) hands out 32-bit results: row vector*16 + lane*4 + i is at position lane*16 + vector*4 +
// i. So 4 neighbours in position are 4 neighbours in row.
constexpr int row_of_position(int position) {
  return (position & 64) | (position % 16 / 4 * 16) | (position % 64 / 16 * 4) | position % 4;
}

static_assert(row_of_position(0) == 0 && row_of_position(5) == 17 && row_of_position(16) == 4, "layout of the pack");

// Null when `packed` (of `bytes` bytes) is what `codebook_pack` makes for `p`, else what is wrong. Codes are not looked
// at: kernels keep any index within its table.
const char* packed_mismatch(const PackedLayout& p, const void* packed, int64_t bytes);

// Header and codebooks of the pack.
void pack_codebooks(const CodebookWeight& w, const PackedLayout& p, void* packed);

// Codes and scales of the blocks [block_begin, block_end).
void pack_blocks(const CodebookWeight& w, const PackedLayout& p, int64_t block_begin, int64_t block_end, void* packed);

// Makes the tables of `entries` consecutive entries for a kernel's tokens.
struct BuildArgs {
  const float* codebooks;  // [num_codebooks][vec_len][table_entries]
  const float* x;          // [K padded to vectors][tokens]
  int64_t first_entry;
  int entries;
  int num_codebooks, vec_len, table_entries;
  int used_entries;  // 1 << codebook_bits, the part of a table that is made
  void* tables;
};

// Adds the looked-up values of `entries` entries of one block to the partial sums of its rows.
struct GatherArgs {
  const uint8_t* codes;       // [entries][kBlockRows] of code_bytes
  const uint8_t* next_codes;  // the same of a later block: a hint to prefetch, may lie beyond the pack
  const void* tables;
  int entries;
  int table_entries;
  int used_entries;
  int code_bytes;
  bool first;          // of the group: partial sums start at zero, not at `partial`
  bool last;           // of the group: y += scale * partial sum
  float* partial;      // [kBlockRows][tokens]
  float* y;            // [kBlockRows][tokens]
  const void* scales;  // [kBlockRows], read when `last`
  DType scale_dtype;
};

struct CodegemmKernel {
  int tokens;          // tokens of one pass, that share each code read
  int entries;         // most entries whose tables are made at a time
  int gather_entries;  // most entries of one gather; its tables should stay in L1 (or L2, for wide ones)
  void (*build)(const BuildArgs&);
  void (*gather)(const GatherArgs&);
};

// Bytes of a kernel's tables: 4 * tokens * table_entries for each entry.
extern const CodegemmKernel kCodegemmScalar;
extern const CodegemmKernel kCodegemmAvx2, kCodegemmAvx2x4, kCodegemmAvx2x8;
extern const CodegemmKernel kCodegemmAvx512x16;
extern const CodegemmKernel kCodegemmVbmi;  // codebook_bits <= 8 only

// y[:, rows of the blocks] for all tokens, at least as accurate as asked. Threads call it with disjoint ranges of
// blocks; each makes all tables for itself, so a range should not be short.
void codegemm(const PackedLayout& p, const void* packed, const Io& io, Isa isa, Accuracy accuracy, int64_t block_begin,
              int64_t block_end);

// Row n, fp32, into out [J * vec_len]; codebooks are fp32 [num_codebooks][1 << codebook_bits][vec_len].
void codebook_dequantize_row_avx2(const CodebookWeight& w, const float* codebooks, int64_t n, float* out);

// W[row_begin : row_end] of `dtype`, by exactly the fp32 operations of SPEC.md, rounded once.
void codebook_dequantize(const CodebookWeight& w, Isa isa, int64_t row_begin, int64_t row_end, DType dtype, void* out);

}  // namespace lutgemm
