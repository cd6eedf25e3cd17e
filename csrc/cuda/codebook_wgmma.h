// codebook_mma for more than 32 tokens on Hopper: codebook_wgmma.cu, and codebook_tokens.cu, which prepares x.
#pragma once

#include "cuda/codebook_mma.h"

namespace lutgemm::cuda {

// Of a block's tokens, 16 inputs.
LUTGEMM_ANYWHERE constexpr int wgmma_step_bytes(int tokens) { return tokens * 16 * 2; }

// No splits where it does not take the problem.
struct CodebookWgmmaPlan {
  int tokens;  // of a block: 64 or 128
  int token_blocks, row_blocks;
  BlockPlan rows;
  int splits, split_chunks;
  int stages, copies, table_bytes;
  int64_t shared_bytes;
  int64_t token_bytes, scale_bytes;  // of the workspace, before the partial sums
};

CodebookWgmmaPlan plan_codebook_wgmma(const CodebookMmaProblem& p, const Gpu& gpu);
void codebook_wgmma(const CodebookMmaProblem& p, const CodebookWgmmaPlan& plan, const Gpu& gpu);

// x as [block of `block_tokens`][k step of 16][half][token][t 4][2] fp16, and a scale for each token.
void codebook_tokens(const CodebookMmaProblem& p, int token_blocks, int block_tokens, unsigned char* tokens,
                     float* token_scales, const Gpu& gpu);

}  // namespace lutgemm::cuda
