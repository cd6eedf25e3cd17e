// What lut_gemm and biqgemm share on every instruction set: the kernel table, sums of x, and the epilogue.
#include "bcq.h"
#include "convert.h"
#include "isa.h"

namespace lutgemm {

const LutKernels& lut_kernels([[maybe_unused]] Isa isa) {
  // Tables of 32 k and one token: 4 slices of 256 entries; 8 half tables of 8; 8 tables of 16. A tile leaves half of a
  // 32 KiB L1 to the codes. The scalar tables are 16 times larger for their k: one token fills such a tile.
  static const LutKernels scalar_kernels{
      4 * 256, 1, 16 << 10, scalar::build_tables, scalar::lut_gemm_block, scalar::biqgemm_block};
#if LUTGEMM_X86
  static const LutKernels avx2_kernels{
      8 * 8, 8, 16 << 10, avx2::build_tables, avx2::lut_gemm_block, avx2::biqgemm_block};
  static const LutKernels avx512_kernels{
      8 * 16, 8, 16 << 10, avx512::build_tables, avx512::lut_gemm_block, avx512::biqgemm_block};
  if (isa >= Isa::kAvx512) return avx512_kernels;
  if (isa == Isa::kAvx2) return avx2_kernels;
#endif
  return scalar_kernels;
}

float group_sum(const float* x, int64_t words) {
  float lanes[32] = {};
  for (int64_t w = 0; w < words; ++w) {
    for (int i = 0; i < 32; ++i) lanes[i] += x[w * 32 + i];
  }
  for (int width = 16; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

void write_row_block(int64_t N, Isa isa, const Io& io, int64_t m, int64_t row_block, const float* y64) {
  const int64_t row = row_block * kRowBlock;
  const int64_t count = N - row < kRowBlock ? N - row : kRowBlock;
  const int64_t size = dtype_bytes(io.dtype);
  float sums[kRowBlock];
  if (io.bias) {
    load_floats(isa, io.dtype, static_cast<const uint8_t*>(io.bias) + row * size, count, sums);
    for (int64_t r = 0; r < count; ++r) sums[r] += y64[r];
    y64 = sums;
  }
  store_floats(isa, io.dtype, y64, count, static_cast<uint8_t*>(io.y) + (m * N + row) * size);
}

}  // namespace lutgemm
