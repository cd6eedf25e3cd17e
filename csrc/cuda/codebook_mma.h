// Codebook weights on tensor cores (codebook_mma.cu, codebook_gemm.cu, codebook_wgmma.cu). No torch and no CUDA header
// here.
#pragma once

#include <cstdint>

#include "cuda/problem.h"
#include "cuda/siblings.h"

namespace lutgemm::cuda {

// How codebook_mma divides a weight. In a step each of the 4 lanes that share a row of a 16 x 16 fragment takes `width`
// adjacent inputs, that is `slots` slices, so a step is 4 * width inputs of one group; groups are filled up to whole
// steps. A plane is one codebook, or one term of it (see terms). An item is the codes of one plane and slot; the items
// of a step are padded to a power of two, and 8 of them make a lane's load: a chunk.
struct MmaSteps {
  int width, slots;
  int groups;
  int steps_per_group;  // of a whole group
  int items;            // of a step: a power of two
  int chunks;           // of a row, a multiple of unit_chunks
  int unit_chunks;      // chunks that hold whole steps: 1, or items / 8
};

constexpr int kChunkItems = 8;
constexpr int kMmaTileRows = 32;  // of a warp: two fragments that share x
static_assert(kMmaTileRows == kSiblingRows);

constexpr MmaSteps mma_steps(int64_t K, int64_t group_size, int planes, int vec_len) {
  MmaSteps s{};
  s.width = vec_len < 4 ? 4 : vec_len;
  s.slots = s.width / vec_len;
  const int64_t inputs = 4 * s.width, group = group_size < K ? group_size : K;
  s.groups = int(ceil_div(K, group));
  s.steps_per_group = int(ceil_div(group, inputs));
  s.items = 1;
  while (s.items < planes * s.slots) s.items *= 2;
  s.unit_chunks = s.items > kChunkItems ? s.items / kChunkItems : 1;
  const int64_t last = K - (s.groups - 1) * group;
  const int64_t steps = int64_t(s.groups - 1) * s.steps_per_group + ceil_div(last, inputs);
  s.chunks = int(round_up(ceil_div(steps * s.items, kChunkItems), s.unit_chunks));
  return s;
}

// codes   uint8 [ceil(N / 16), to an even number][chunks][32 lanes][8 items][2 rows]: lane 4 * r + t has rows r, r + 8
// scales  [tiles of 32 rows][G][4 t][4 f][2 i] of row 8 * f + 2 * t + i; fp32, or fp16
// tables  [planes][1 << codebook_bits][vec_len] of x's dtype; codebook c is the sum of the planes c, c + num_codebooks,
// .. units   fp32 [3]: of tables, scales, half_tables; y is to be multiplied by the first two
struct CodebookMmaProblem {
  GpuIo io;  // fp16 or bf16
  int64_t group_size;
  int planes, vec_len, codebook_bits;  // at most 12 planes, 8 bits
  const void* codes;
  const void* scales;
  bool float_scales;
  const void* tables;
  const void* half_tables;  // fp16, at most 1/2: tables beside fp16 x; null unless weights may be rounded to fp16 or,
                            // beside bf16 x, to bf16
  const float* units;
  Siblings siblings;  // tables and units are those of each, one after another
  void* workspace;
};

struct CodebookMmaPlan {
  int octets;        // of tokens, in one pass: 1 or 2
  int splits;        // of K over blocks
  int split_chunks;  // of all but the last
  int blocks;        // along N; a block takes every tile of 32 rows that is as far on as its sibling has blocks
  BlockPlan rows;    // of each
  int copies;        // of a table in shared memory
  int table_bytes, x_bytes, sum_bytes;
};

CodebookMmaPlan plan_codebook_mma(const CodebookMmaProblem& p, int sm_count, int shared_limit);

// For more than 16 tokens: codebook_gemm.cu. No splits where M is smaller, or its shared memory does not suffice.
struct CodebookGemmPlan {
  int token_blocks, row_blocks;
  BlockPlan rows;
  int splits, split_chunks;
  int stage_chunks;  // whose x is in shared memory, twice
  int copies;
  int table_bytes, stage_bytes;
};

CodebookGemmPlan plan_codebook_gemm(const CodebookMmaProblem& p, int sm_count, int shared_limit);
void codebook_gemm(const CodebookMmaProblem& p, const CodebookGemmPlan& plan, const Gpu& gpu);

int64_t codebook_mma_workspace(const CodebookMmaProblem& p, const Gpu& gpu);
void codebook_mma(const CodebookMmaProblem& p, const Gpu& gpu);

}  // namespace lutgemm::cuda
