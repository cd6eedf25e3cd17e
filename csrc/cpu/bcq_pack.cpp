// The prepared layout of bcq.h: sizes, header, packing.
#include <cstring>

#include "bcq.h"
#include "convert.h"
#include "packed_header.h"

namespace lutgemm {
namespace {

constexpr uint64_t kMagic = 0x3151'4342'5455'4CULL;  // "LUTBCQ1"

struct Header {
  uint64_t magic;
  int64_t N, K, group_size;
  int32_t bits, uniform, has_offsets, scale_dtype;
  int64_t bytes;
};
static_assert(sizeof(Header) <= kPackedHeaderBytes, "the header has its own cache line");

void pack_centers(const BcqWeight& weight, int64_t row, int64_t g, float* out) {
  const float middle = float((1 << weight.bits) - 1) / 2;
  for (int64_t r = 0; r < kRowBlock; ++r) {
    const int64_t n = row + r;
    out[r] = n < weight.N ? middle - load_float(weight.zeros, weight.zeros_dtype, n * weight.G + g) : 0.0f;
  }
}

}  // namespace

uint8_t* pack_column(const BcqWeight& weight, const void* source, DType dtype, int64_t row, int64_t g, uint8_t* out) {
  const int64_t size = dtype_bytes(dtype);
  for (int64_t r = 0; r < kRowBlock; ++r, out += size) {
    if (row + r < weight.N) {
      std::memcpy(out, static_cast<const uint8_t*>(source) + ((row + r) * weight.G + g) * size, size_t(size));
    } else {
      std::memset(out, 0, size_t(size));
    }
  }
  return out;
}

PackedBcq packed_layout(int64_t N, int64_t K, int64_t group_size, int bits, bool uniform, bool has_offsets,
                        DType scale_dtype) {
  PackedBcq p{};
  p.N = N;
  p.K = K;
  p.group_size = group_size;
  p.bits = bits;
  p.uniform = uniform;
  p.has_offsets = has_offsets;
  p.scale_dtype = scale_dtype;
  p.G = ceil_div(K, group_size);
  p.words = ceil_div(K, 32);
  p.row_blocks = ceil_div(N, kRowBlock);
  p.words_per_group = p.G == 1 ? p.words : group_size / 32;
  const int64_t scale = dtype_bytes(scale_dtype);
  p.scale_bytes = kRowBlock * (uniform ? scale + 4 : scale * (bits + (has_offsets ? 1 : 0)));
  p.group_bytes = p.scale_bytes + p.words_per_group * bits * kRowBlock * 4;
  p.block_bytes = p.G * p.scale_bytes + p.words * bits * kRowBlock * 4;
  return p;
}

int64_t packed_bytes(const PackedBcq& layout) {
  return kPackedHeaderBytes + layout.row_blocks * layout.block_bytes + kPackedTailBytes;
}

void write_packed_header(const PackedBcq& p, uint8_t* packed) {
  const Header header{
      kMagic,         p.N, p.K, p.group_size, p.bits, p.uniform ? 1 : 0, p.has_offsets ? 1 : 0, int32_t(p.scale_dtype),
      packed_bytes(p)};
  std::memset(packed, 0, kPackedHeaderBytes);
  std::memcpy(packed, &header, sizeof header);
  std::memset(packed + header.bytes - kPackedTailBytes, 0, kPackedTailBytes);
}

void pack_row_blocks(const BcqWeight& weight, const PackedBcq& p, int64_t begin, int64_t end, uint8_t* packed) {
  const int64_t scale = dtype_bytes(p.scale_dtype);
  for (int64_t block = begin; block < end; ++block) {
    uint8_t* out = packed + kPackedHeaderBytes + block * p.block_bytes;
    const int64_t row = block * kRowBlock;
    for (int64_t g = 0; g < p.G; ++g) {
      const int scale_planes = p.uniform ? 1 : p.bits;
      for (int b = 0; b < scale_planes; ++b) {
        const auto* plane = static_cast<const uint8_t*>(weight.scales) + b * weight.N * weight.G * scale;
        out = pack_column(weight, plane, p.scale_dtype, row, g, out);
      }
      if (p.uniform) {
        float centers[kRowBlock];
        pack_centers(weight, row, g, centers);
        std::memcpy(out, centers, sizeof centers);
        out += sizeof centers;
      } else if (p.has_offsets) {
        out = pack_column(weight, weight.offsets, p.scale_dtype, row, g, out);
      }
      const int64_t first = g * p.words_per_group;
      for (int64_t w = first; w < first + p.words_in_group(g); ++w) {
        for (int b = 0; b < p.bits; ++b, out += kRowBlock * 4) {
          uint32_t words[kRowBlock];
          for (int64_t r = 0; r < kRowBlock; ++r) {
            const int64_t n = row + r;
            words[r] = n < weight.N ? weight.codes[(b * weight.N + n) * weight.words + w] : 0u;
          }
          std::memcpy(out, words, sizeof words);
        }
      }
    }
  }
}

const char* parse_packed(const uint8_t* packed, int64_t bytes, PackedBcq* layout) {
  Header h;
  if (bytes < kPackedHeaderBytes) return "it is too short for a header";
  std::memcpy(&h, packed, sizeof h);
  if (h.magic != kMagic) return "it does not start with the mark of a prepared BCQ weight";
  if (const char* fault = bcq_header_fault(h)) return fault;
  *layout = packed_layout(h.N, h.K, h.group_size, h.bits, h.uniform, h.has_offsets, DType(h.scale_dtype));
  if (h.bytes != packed_bytes(*layout) || h.bytes != bytes) return "its size is not what its header says";
  layout->blocks = packed + kPackedHeaderBytes;
  return nullptr;
}

}  // namespace lutgemm
