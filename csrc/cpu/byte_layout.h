// BCQ for look-ups in registers: the prepared layout that integer tables read.
//
//   y[m, n] = sum over g of ( offset[n, g] * sum(x of g) + sum over b of scale[b, n, g] * dot[b, n, g] ) + bias[n]
//   dot[b, n, g] = sum over the k of g of sign(b, n, k) * x[m, k]
//
// A slice is 8 consecutive k; the signs of one row and plane in a slice are one code byte, lowest bit first. A span is
// up to 16 slices of one group: the stretch of K whose table entries share a step, and whose look-ups a 16-bit sum
// holds. In memory, strictly in the order in which kernels read,
//
//   [chunk of up to 8 row blocks][span][row block of 64]{ scales, if the span is the first of its group; codes }
//
//   scales   [bits][64], offsets [64] if any, of scale_dtype; or, uniform: s [64] of scale_dtype, zeros [64]
//   codes    [slice][bits][64 bytes]
//
//        span 0 of group 0                  span 1                             row_of_byte: which row a byte is
//   +----------+----------+--   --+----------+----------+--   --+--            +-------------------------------+
//   | block 0  | block 1  |  ...  | block 7  | block 0  |  ...  |  ...         | 0-3 16-19 32-35 48-51 | 4-7 ..|
//   | S codes  | S codes  |       | S codes  | codes    |       |              +-------------------------------+
//   +----------+----------+--   --+----------+----------+--   --+--             lane 0 of the vector      lane 1
//
// The tables of a span (4 KiB a token) stay in L1 while the rows of a chunk stream past; y of a chunk (2 KiB a token)
// stays there from span to span. Rows beyond N have zero scales, codes beyond K look up zeros.
//
// For AVX-512 VBMI a code byte is stored folded: the sums of a slice come in pairs of opposite sign, so a table keeps
// the 128 in which bit 7 counts as plus. Byte b with bit 7 set is stored as b ^ 0x80; any other one as ~b, whose bit 7
// then says: negate. Kernels that look up nibbles would need 3 operations more on top of 15 to undo it: their codes
// are stored plain.
#pragma once

#include <cstdint>

#include "../params.h"

namespace lutgemm {

constexpr int64_t kByteRows = 64;        // rows of a block: the bytes of a vector
constexpr int64_t kMostChunkBlocks = 8;  // row blocks of a chunk, the unit of work of a thread; fewer in small matrices
constexpr int64_t kSpanSlices = 16;

// The row of a block whose codes byte `position` holds. Two rounds of interleaving within 128-bit lanes (bytes to
// 16-bit sums, those to fp32) then yield the rows in order.
constexpr int64_t row_of_byte(int64_t position) {
  const int64_t lane = position / 16, byte = position % 16;
  return 16 * (byte / 4) + 4 * lane + byte % 4;
}

struct PackedBytes {
  int64_t N, K, G, group_size;
  int bits;
  bool uniform, has_offsets;
  DType scale_dtype, zeros_dtype;
  bool folded;
  int64_t row_blocks, chunks;
  int64_t chunk_blocks;  // of a full chunk
  int64_t slices;        // ceil(K / 8)
  int64_t group_slices;  // of a full group
  int64_t group_spans;   // of a full group
  int64_t spans;         // of a row
  int64_t scale_bytes;   // of one row block and group
  int64_t block_bytes;   // of one row block, all spans
  const uint8_t* data;

  int64_t blocks_in(int64_t chunk) const {
    const int64_t left = row_blocks - chunk * chunk_blocks;
    return left < chunk_blocks ? left : chunk_blocks;
  }
};

// Where span `index` of a row lies.
struct Span {
  int64_t group, slice, slices;  // its group, its first slice in K, how many
  bool starts_group;
  int64_t bytes;        // of one row block
  int64_t offset;       // bytes of one row block before it
  int64_t from_scales;  // bytes of one row block from the start of its group's first span to it
};

inline Span span_at(const PackedBytes& p, int64_t index) {
  Span s;
  s.group = index / p.group_spans;
  const int64_t inner = index % p.group_spans;
  s.starts_group = inner == 0;
  s.slice = s.group * p.group_slices + inner * kSpanSlices;
  const int64_t group_end = (s.group + 1) * p.group_slices < p.slices ? (s.group + 1) * p.group_slices : p.slices;
  s.slices = group_end - s.slice < kSpanSlices ? group_end - s.slice : kSpanSlices;
  const int64_t slice_bytes = p.bits * kByteRows;
  s.bytes = (s.starts_group ? p.scale_bytes : 0) + s.slices * slice_bytes;
  s.offset = (s.group + (s.starts_group ? 0 : 1)) * p.scale_bytes + s.slice * slice_bytes;
  s.from_scales = s.starts_group ? 0 : p.scale_bytes + inner * kSpanSlices * slice_bytes;
  return s;
}

// One row block's part of a span.
struct Piece {
  const uint8_t *scales, *codes;
};

inline Piece piece_at(const PackedBytes& p, const Span& s, int64_t chunk, int64_t block) {
  const int64_t blocks = p.blocks_in(chunk);
  const uint8_t* start = p.data + chunk * p.chunk_blocks * p.block_bytes + blocks * s.offset + block * s.bytes;
  if (s.starts_group) return {start, start + p.scale_bytes};
  const int64_t first_bytes = p.scale_bytes + kSpanSlices * p.bits * kByteRows;  // of the group's first span
  const uint8_t* first = p.data + chunk * p.chunk_blocks * p.block_bytes + blocks * (s.offset - s.from_scales);
  return {first + block * first_bytes, start};
}

// The layout of a weight of these sizes; `data` is null.
PackedBytes byte_layout(int64_t N, int64_t K, int64_t group_size, int bits, bool uniform, bool has_offsets,
                        DType scale_dtype, DType zeros_dtype, bool folded);

// Header and data together.
int64_t byte_layout_bytes(const PackedBytes& layout);

void write_byte_header(const PackedBytes& layout, uint8_t* packed);

// Fills chunks [begin, end) of `packed`.
void pack_byte_chunks(const BcqWeight& weight, const PackedBytes& layout, int64_t begin, int64_t end, uint8_t* packed);

// Whether `packed` starts with the mark of this layout.
bool is_byte_layout(const uint8_t* packed, int64_t bytes);

// Reads a header that may hold anything. Null, or why `packed` is not a prepared weight of `bytes` bytes.
const char* parse_byte_layout(const uint8_t* packed, int64_t bytes, PackedBytes* layout);

}  // namespace lutgemm
