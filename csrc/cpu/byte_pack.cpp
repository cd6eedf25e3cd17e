// The prepared layout of byte_layout.h: sizes, header, packing.
#include <algorithm>
#include <cstring>

#include "bcq.h"
#include "byte_layout.h"
#include "convert.h"
#include "packed_header.h"

namespace lutgemm {
namespace {

constexpr uint64_t kMagic = 0x3142'4342'5455'4CULL;  // "LUTBCB1"

struct Header {
  uint64_t magic;
  int64_t N, K, group_size;
  int32_t bits, uniform, has_offsets, scale_dtype, zeros_dtype, folded;
  int64_t bytes;
};
static_assert(sizeof(Header) <= kPackedHeaderBytes, "the header has its own cache line");
static_assert(kByteRows == kRowBlock, "pack_column fills one block");

uint8_t* pack_scales(const BcqWeight& weight, const PackedBytes& p, int64_t row, int64_t g, uint8_t* out) {
  const int64_t plane_bytes = weight.N * weight.G * dtype_bytes(p.scale_dtype);
  for (int b = 0; b < (p.uniform ? 1 : p.bits); ++b) {
    out = pack_column(weight, static_cast<const uint8_t*>(weight.scales) + b * plane_bytes, p.scale_dtype, row, g, out);
  }
  if (p.uniform) return pack_column(weight, weight.zeros, p.zeros_dtype, row, g, out);
  return p.has_offsets ? pack_column(weight, weight.offsets, p.scale_dtype, row, g, out) : out;
}

uint8_t folded(uint8_t code) { return code & 0x80 ? code ^ 0x80 : uint8_t(~code); }

// Code bytes [slice, slice + slices) of all planes, rows from `row`.
void pack_codes(const BcqWeight& weight, bool fold, int64_t row, int64_t slice, int64_t slices, uint8_t* out) {
  for (int64_t position = 0; position < kByteRows; ++position) {
    const int64_t n = row + row_of_byte(position);
    for (int b = 0; b < weight.bits; ++b) {
      const uint32_t* words = weight.codes + (b * weight.N + n) * weight.words;
      for (int64_t j = 0; j < slices; ++j) {
        const int64_t at = slice + j;
        const uint8_t code = n < weight.N ? uint8_t(words[at / 4] >> (8 * (at % 4))) : uint8_t(0);
        out[(j * weight.bits + b) * kByteRows + position] = fold ? folded(code) : code;
      }
    }
  }
}

}  // namespace

PackedBytes byte_layout(int64_t N, int64_t K, int64_t group_size, int bits, bool uniform, bool has_offsets,
                        DType scale_dtype, DType zeros_dtype, bool folded) {
  PackedBytes p{};
  p.N = N;
  p.K = K;
  p.group_size = group_size;
  p.bits = bits;
  p.uniform = uniform;
  p.has_offsets = has_offsets;
  p.scale_dtype = scale_dtype;
  p.zeros_dtype = zeros_dtype;
  p.folded = folded;
  p.G = ceil_div(K, group_size);
  p.row_blocks = ceil_div(N, kByteRows);
  // At least four chunks, so that threads have something to share; an even number of blocks, which kernels take in
  // twos.
  p.chunk_blocks = std::min(kMostChunkBlocks, 2 * ceil_div(p.row_blocks, 8));
  p.chunks = ceil_div(p.row_blocks, p.chunk_blocks);
  p.slices = ceil_div(K, 8);
  p.group_slices = p.G == 1 ? p.slices : group_size / 8;
  p.group_spans = ceil_div(p.group_slices, kSpanSlices);
  const int64_t last = p.slices - (p.G - 1) * p.group_slices;
  p.spans = (p.G - 1) * p.group_spans + ceil_div(last, kSpanSlices);
  const int64_t scale = dtype_bytes(scale_dtype);
  p.scale_bytes = kByteRows * (uniform ? scale + dtype_bytes(zeros_dtype) : scale * (bits + (has_offsets ? 1 : 0)));
  p.block_bytes = p.G * p.scale_bytes + p.slices * bits * kByteRows;
  return p;
}

int64_t byte_layout_bytes(const PackedBytes& p) {
  return kPackedHeaderBytes + p.row_blocks * p.block_bytes + kPackedTailBytes;
}

void write_byte_header(const PackedBytes& p, uint8_t* packed) {
  const Header header{kMagic,
                      p.N,
                      p.K,
                      p.group_size,
                      p.bits,
                      p.uniform ? 1 : 0,
                      p.has_offsets ? 1 : 0,
                      int32_t(p.scale_dtype),
                      int32_t(p.zeros_dtype),
                      p.folded ? 1 : 0,
                      byte_layout_bytes(p)};
  std::memcpy(packed, &header, sizeof header);
  std::memset(packed + header.bytes - kPackedTailBytes, 0, kPackedTailBytes);
}

void pack_byte_chunks(const BcqWeight& weight, const PackedBytes& p, int64_t begin, int64_t end, uint8_t* packed) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    uint8_t* out = packed + kPackedHeaderBytes + chunk * p.chunk_blocks * p.block_bytes;
    for (int64_t s = 0; s < p.spans; ++s) {
      const Span span = span_at(p, s);
      for (int64_t block = 0; block < p.blocks_in(chunk); ++block) {
        const int64_t row = (chunk * p.chunk_blocks + block) * kByteRows;
        if (span.starts_group) out = pack_scales(weight, p, row, span.group, out);
        pack_codes(weight, p.folded, row, span.slice, span.slices, out);
        out += span.slices * p.bits * kByteRows;
      }
    }
  }
}

bool is_byte_layout(const uint8_t* packed, int64_t bytes) {
  return bytes >= kPackedHeaderBytes && std::memcmp(packed, &kMagic, sizeof kMagic) == 0;
}

const char* parse_byte_layout(const uint8_t* packed, int64_t bytes, PackedBytes* layout) {
  Header h;
  if (!is_byte_layout(packed, bytes)) return "it does not start with the mark of a prepared BCQ weight";
  std::memcpy(&h, packed, sizeof h);
  if (const char* fault = bcq_header_fault(h)) return fault;
  if (h.zeros_dtype < int(DType::kFloat32) || h.zeros_dtype > int(DType::kUInt8)) {
    return "its header has an unknown dtype of zeros";
  }
  if (h.folded & ~1) return "its header has an unknown kind of codes";
  *layout = byte_layout(h.N, h.K, h.group_size, h.bits, h.uniform, h.has_offsets, DType(h.scale_dtype),
                        DType(h.zeros_dtype), h.folded);
  if (h.bytes != byte_layout_bytes(*layout) || h.bytes != bytes) return "its size is not what its header says";
  layout->data = packed + kPackedHeaderBytes;
  return nullptr;
}

}  // namespace lutgemm
