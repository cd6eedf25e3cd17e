// BCQ for some 16 to 256 tokens: W is dequantized to fp16 in registers and multiplied by tensor cores.
#pragma once

#include <cstddef>

#include "cuda/bit_planes.h"

namespace lutgemm::cuda {

constexpr int kGemmRowTiles = 2;  // tiles of 16 rows that a warp has
constexpr int kGemmStages = 3;

struct DequantGemmProblem {
  BitPlanesProblem weight;  // with its io; workspace is of dequant_gemm_workspace bytes
  const float* row_scales;  // [16 * tiles], powers of two that bring the rows of W near 2^8
};

struct DequantGemmPlan {
  int token_tiles;  // n tiles of an mma, of 8 tokens each: 2, 4 or 8
  int warps;
  int64_t row_blocks, splits, token_blocks;
  int64_t split_chunks;  // of every split but the last
  size_t shared_bytes;
};

DequantGemmPlan plan_dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu);

int64_t dequant_gemm_workspace(const DequantGemmProblem& problem, const Gpu& gpu);

// y = x @ W.T + bias for any M.
void dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu);

}  // namespace lutgemm::cuda
