// W[row_begin : row_end] of a codebook weight, for any CPU; the same loops compiled for AVX2 are beside it.
#include <vector>

#include "codebook.h"
#include "codebook_dequantize_rows.h"
#include "convert.h"
#include "isa.h"

namespace lutgemm {

void codebook_dequantize(const CodebookWeight& w, Isa isa, int64_t row_begin, int64_t row_end, DType dtype, void* out) {
  const int64_t values = (int64_t(w.num_codebooks) << w.codebook_bits) * w.vec_len;
  std::vector<float> codebooks(values), row(w.J * w.vec_len);
  load_floats(isa, w.scale_dtype, w.codebooks, values, codebooks.data());
  auto* dequantize = dequantize_row;
#if LUTGEMM_X86
  if (isa >= Isa::kAvx2) dequantize = codebook_dequantize_row_avx2;
#endif
  for (int64_t n = row_begin; n < row_end; ++n) {
    dequantize(w, codebooks.data(), n, row.data());
    store_floats(isa, dtype, row.data(), w.K, static_cast<char*>(out) + (n - row_begin) * w.K * dtype_bytes(dtype));
  }
}

}  // namespace lutgemm
