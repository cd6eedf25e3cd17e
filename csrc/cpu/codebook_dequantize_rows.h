// Rows of a codebook weight, written out. Included inside a target region, hence in an unnamed namespace and with no
// include guard: the loops over d are vectorised for that target. Its own includes must have been seen before the
// region.
#include "codebook.h"
#include "convert.h"

namespace lutgemm {
namespace {

// out [K rounded up to vectors]: row n in fp32, by the operations of SPEC.md in their order.
// codebooks: fp32 [num_codebooks][1 << codebook_bits][kVec].
template <int kVec, class Code>
void dequantize_row_of(const CodebookWeight& w, const float* codebooks, int64_t n, float* out) {
  const Code* codes = static_cast<const Code*>(w.codes) + n * w.J;
  const int64_t entries = int64_t(1) << w.codebook_bits, mask = entries - 1;
  const int64_t group_vectors = w.group_size >= w.K ? w.J : w.group_size / kVec;
  for (int64_t g = 0, j = 0; g < w.G; ++g) {
    const float scale = load_float(w.scales, w.scale_dtype, n * w.G + g);
    const int64_t end = j + group_vectors < w.J ? j + group_vectors : w.J;
    for (; j < end; ++j, out += kVec) {
      const float* centroid = codebooks + (codes[j] & mask) * kVec;
      float value[kVec];
      for (int d = 0; d < kVec; ++d) value[d] = centroid[d];
      for (int64_t c = 1; c < w.num_codebooks; ++c) {
        centroid = codebooks + (c * entries + (codes[c * w.N * w.J + j] & mask)) * kVec;
        for (int d = 0; d < kVec; ++d) value[d] += centroid[d];
      }
      for (int d = 0; d < kVec; ++d) out[d] = value[d] * scale;
    }
  }
}

template <class Code>
void dequantize_row_by_vec(const CodebookWeight& w, const float* codebooks, int64_t n, float* out) {
  switch (w.vec_len) {
    case 2:
      return dequantize_row_of<2, Code>(w, codebooks, n, out);
    case 4:
      return dequantize_row_of<4, Code>(w, codebooks, n, out);
    case 8:
      return dequantize_row_of<8, Code>(w, codebooks, n, out);
    default:
      return dequantize_row_of<16, Code>(w, codebooks, n, out);
  }
}

void dequantize_row(const CodebookWeight& w, const float* codebooks, int64_t n, float* out) {
  if (w.codebook_bits <= 8) {
    dequantize_row_by_vec<uint8_t>(w, codebooks, n, out);
  } else {
    dequantize_row_by_vec<uint16_t>(w, codebooks, n, out);
  }
}

}  // namespace
}  // namespace lutgemm
