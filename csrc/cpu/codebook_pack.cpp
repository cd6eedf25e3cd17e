// The prepared layout of codebook.h: made from the stored tensors, and checked.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "codebook.h"
#include "convert.h"

namespace lutgemm {
namespace {

constexpr int32_t kMagic = 0x4243474c;  // "LGCB" in memory
constexpr int32_t kLayoutVersion = 2;

struct Header {
  int32_t words[16];
};

Header header_of(const PackedLayout& p) {
  return Header{{kMagic, kLayoutVersion, int32_t(p.N), int32_t(p.K), int32_t(p.group_size), p.num_codebooks, p.vec_len,
                 p.codebook_bits, int32_t(p.scale_dtype), kBlockRows, p.tile_entries}};
}

// Codes of entries [first, first + count) and one block, masked to the codebook, rows beyond N as code 0.
template <class Code>
void pack_codes(const CodebookWeight& w, int64_t first, int64_t count, int64_t row0, Code* out) {
  const Code* codes = static_cast<const Code*>(w.codes);
  const Code mask = Code((1 << w.codebook_bits) - 1);
  for (int64_t e = 0; e < count; ++e) {
    const int64_t c = (first + e) % w.num_codebooks, j = (first + e) / w.num_codebooks;
    const Code* column = codes + c * w.N * w.J + j;
    for (int position = 0; position < kBlockRows; ++position) {
      const int64_t n = row0 + row_of_position(position);
      *out++ = n < w.N ? Code(column[n * w.J] & mask) : Code(0);
    }
  }
}

// Codebooks fp32 [num_codebooks][vec_len][256] -> the part `rounded` of the pack.
void pack_rounded(const PackedLayout& p, const float* codebooks, uint8_t* out) {
  RoundedCodebooks rounded{};
  auto* integers = reinterpret_cast<int16_t*>(out + 64);
  const int64_t entries = p.table_entries, size = p.vec_len * entries;
  for (int64_t c = 0; c < p.num_codebooks; ++c, codebooks += size, integers += size) {
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = 0; i < size; ++i) {
      finite = finite && std::isfinite(codebooks[i]);
      largest = std::max(largest, std::fabs(codebooks[i]));
    }
    const double unit = finite ? largest / 32767.0 : 0.0;
    double largest_square = 0.0;
    for (int64_t i = 0; i < entries; ++i) {
      double square = 0.0;
      for (int64_t d = 0; d < p.vec_len; ++d) {
        const double integer = unit > 0.0 ? std::nearbyint(codebooks[d * entries + i] / unit) : 0.0;
        integers[d / 2 * 2 * entries + 2 * i + d % 2] = int16_t(integer);
        square += integer * integer;
      }
      largest_square = std::max(largest_square, square);
    }
    rounded.unit[c] = finite ? float(unit) : std::nanf("");
    rounded.norm[c] = float(std::sqrt(largest_square) * unit * (1.0 + 0x1p-20));
  }
  std::memset(out, 0, 64);
  std::memcpy(out, &rounded, sizeof rounded);
}

}  // namespace

PackedLayout packed_layout(const CodebookWeight& w) {
  PackedLayout p{};
  p.N = w.N, p.K = w.K, p.J = w.J, p.G = w.G;
  p.group_size = w.group_size;
  p.group_vectors = w.group_size >= w.K ? w.J : w.group_size / w.vec_len;
  p.blocks = (w.N + kBlockRows - 1) / kBlockRows;
  p.num_codebooks = w.num_codebooks, p.vec_len = w.vec_len, p.codebook_bits = w.codebook_bits;
  p.code_bytes = w.codebook_bits > 8 ? 2 : 1;
  p.table_entries = std::max(256, 1 << w.codebook_bits);
  p.tile_entries = p.code_bytes == 1 ? kTileEntries : std::max(1, kTileTableBytes / (4 * p.table_entries));
  p.scale_dtype = w.scale_dtype;
  p.scale_bytes = int(dtype_bytes(w.scale_dtype));
  return p;
}

const char* packed_mismatch(const PackedLayout& p, const void* packed, int64_t bytes) {
  if (bytes != p.total_bytes()) return "its size is not that of this weight's layout";
  const Header expected = header_of(p);
  if (std::memcmp(packed, &expected, sizeof expected) != 0) return "its header is not that of this weight";
  return nullptr;
}

void pack_codebooks(const CodebookWeight& w, const PackedLayout& p, void* packed) {
  const Header header = header_of(p);
  std::memcpy(packed, &header, sizeof header);
  uint8_t* base = static_cast<uint8_t*>(packed);
  float* const codebooks = reinterpret_cast<float*>(base + p.codebook_offset());
  float* out = codebooks;
  const int64_t used = int64_t(1) << w.codebook_bits;
  for (int64_t c = 0; c < w.num_codebooks; ++c) {
    for (int64_t d = 0; d < w.vec_len; ++d) {
      for (int64_t i = 0; i < p.table_entries; ++i) {
        *out++ = i < used ? load_float(w.codebooks, w.scale_dtype, (c * used + i) * w.vec_len + d) : 0.0f;
      }
    }
  }
  if (p.code_bytes == 1) pack_rounded(p, codebooks, base + p.rounded_offset());
}

void pack_blocks(const CodebookWeight& w, const PackedLayout& p, int64_t block_begin, int64_t block_end, void* packed) {
  uint8_t* base = static_cast<uint8_t*>(packed);
  const char* scales = static_cast<const char*>(w.scales);
  for (int64_t g = 0; g < p.G; ++g) {
    const int64_t entries = p.group_entries(g);
    for (int64_t e = 0; e < entries; e += p.tile_entries) {
      const int64_t count = std::min<int64_t>(p.tile_entries, entries - e);
      const bool last = e + count == entries;
      const int64_t codes_bytes = count * kBlockRows * p.code_bytes;
      const int64_t block_bytes = codes_bytes + (last ? kBlockRows * p.scale_bytes : 0);
      uint8_t* tile = base + p.group_offset(g) + p.blocks * kBlockRows * e * p.code_bytes;
      for (int64_t block = block_begin; block < block_end; ++block) {
        uint8_t* out = tile + block * block_bytes;
        const int64_t row0 = block * kBlockRows, first = g * p.group_vectors * p.num_codebooks + e;
        if (p.code_bytes == 1) {
          pack_codes(w, first, count, row0, out);
        } else {
          pack_codes(w, first, count, row0, reinterpret_cast<uint16_t*>(out));
        }
        if (!last) continue;
        out += codes_bytes;
        std::memset(out, 0, kBlockRows * p.scale_bytes);
        for (int64_t n = row0; n < std::min(w.N, row0 + kBlockRows); ++n, out += p.scale_bytes) {
          std::memcpy(out, scales + (n * p.G + g) * p.scale_bytes, p.scale_bytes);
        }
      }
    }
  }
}

}  // namespace lutgemm
