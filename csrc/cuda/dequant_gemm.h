// BCQ for some 16 tokens and more: W is dequantized to fp16 in registers and multiplied by tensor cores, by mma.sync on
// any GPU (dequant_gemm.cu) or by wgmma on Hopper (wgmma_gemm.cu).
#pragma once

#include <cstddef>

#include "cuda/bit_planes.h"

namespace lutgemm::cuda {

constexpr int kTokenChunkBytes = 2 * kPlanesChunk;  // of a token, in fp16

enum class GemmForm : int { kBest, kMmaSync, kWgmma };

struct DequantGemmProblem {
  BitPlanesProblem weight;  // with its io; workspace is of dequant_gemm_workspace bytes
  const float* row_scales;  // [16 * tiles], powers of two that bring the rows of W near 2^8
  const float* row_sums;    // [16 * tiles], of the elements of each row
  GemmForm form;
};

struct DequantGemmPlan {
  bool wgmma;
  int tokens;  // of a block, a multiple of 8
  int warps, stages;
  int64_t row_blocks, splits, token_blocks;
  int64_t split_chunks;  // of every split but the last
  size_t shared_bytes;
};

// What both kernels take.
struct GemmArguments {
  DequantGemmProblem problem;
  DequantGemmPlan plan;
  const uint32_t* tokens;     // the prepared activations, in the form's order
  const float* token_scales;  // [plan.tokens * token_blocks]
  const float* token_means;   // [plan.tokens * token_blocks], what was taken from each element
  float* partial;             // [splits, M, N], or null for one split
};

// Throws std::runtime_error for wgmma where there is none, and for a device with too little shared memory.
DequantGemmPlan plan_dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu);

int64_t dequant_gemm_workspace(const DequantGemmProblem& problem, const Gpu& gpu);

// y = x @ W.T + bias for any M.
void dequant_gemm(const DequantGemmProblem& problem, const Gpu& gpu);

}  // namespace lutgemm::cuda
