// Dense rows of W, from a weight as SPEC.md stores it.
#pragma once

#include "cuda/problem.h"

namespace lutgemm::cuda {

// Rows row_begin .. row_end of W into out [row_end - row_begin, K] of `dtype`. Pointers are to device memory; codes,
// codebooks and out are 16-byte aligned.
struct DequantizeRows {
  int64_t row_begin, row_end;
  void* out;
  DType dtype;  // float types
};

void dequantize_bcq(const BcqWeight& weight, const DequantizeRows& rows, const Gpu& gpu);
void dequantize_codebook(const CodebookWeight& weight, const DequantizeRows& rows, const Gpu& gpu);

}  // namespace lutgemm::cuda
