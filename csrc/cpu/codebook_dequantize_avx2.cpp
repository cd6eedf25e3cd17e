// One row of a codebook weight with AVX2.
#include "isa.h"

#if LUTGEMM_X86
#include "codebook.h"
#include "convert.h"

LUTGEMM_TARGET_AVX2_BEGIN
#include "codebook_dequantize_rows.h"

namespace lutgemm {

void codebook_dequantize_row_avx2(const CodebookWeight& w, const float* codebooks, int64_t n, float* out) {
  dequantize_row(w, codebooks, n, out);
}

}  // namespace lutgemm

LUTGEMM_TARGET_END
#endif
