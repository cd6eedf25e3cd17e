// CodeGEMM (NeurIPS 2025): y[m, n] = bias[n] + sum over units u of scales[n, g(u)] * sum over the unit's 4 columns q of
// psumbook[m, q][codes[n, q]]. psumbook.cuh has the table, codegemm.h the order of columns.
//
// A block makes the table of one tile (32 units, K * num_codebooks / vec_len = 128 columns) and streams its rows past:
//
//   codes   [tile][rows / 4][32 lanes][4 rows][4 columns]   16 bytes a lane: its unit of 4 rows; a warp's 512 adjacent
//   warp    a chunk of 32 rows: 8 loads, 128 look-ups a lane, and so 32 partial sums a lane, one for each row
//   sum     over lanes by a transposing butterfly: 31 shuffles turn 32 rows x 32 lanes into one row a lane
//   partial fp32 [tile][M][N], added up in order, with the bias, by reduce_splits
//
// Counts for a row of a tile, 1024 bits of codes: 4 PRMT, 4 LDS, 2 IADD3, 1 I2F, 2 FMUL, 1 HADD2 for the scale, 4 of
// the butterfly (1 SHFL), 1 of loads and addresses: 19.4 warp instructions in the SASS of sm_90 (kFloat 17.5,
// kPair14 29.6 for two tokens), and 5 wavefronts of shared memory. So a multiprocessor can take 205 bits a clock
// (kPair14 138), twice what the memory of an H100 brings, derived and not measured. Making a table of integers takes
// some 590 instructions a warp, 2300 clocks, as long as gathering 460 rows; in that time codes come to registers (64 KB
// a block) and to L2.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/codegemm.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

// Clocks of an SM. A chunk: its 160 wavefronts, or about as long for its 4 KB at the bandwidth that an SM has of an
// H100. A table, from the instructions of 16 warps at 4 a clock: integers by tensor cores, and fp32 by FFMA.
constexpr int64_t kChunkClocks = 165;
constexpr int64_t build_clocks(PsumWord word, int entries, int vec_len) {
  if (is_float(word)) {
    return 300 + int64_t(entries) * (5 * vec_len / 2 + 5) / (word == PsumWord::kFloat ? 2 : 4);
  }
  return 2300 * word_tokens(word);
}

constexpr int kSlabTokens = 16;  // of a launch: bounds the workspace

}  // namespace

CodegemmPlan plan_codegemm(const CodegemmProblem& p, const Gpu& gpu) {
  const int sm_count = gpu.sm_count;
  const CodegemmUnits units = codegemm_units(p.io.K, p.group_size, p.num_codebooks, p.vec_len);
  const bool wide = p.codebook_bits > 8;
  CodegemmPlan plan{};
  plan.word = PsumWord::kInt16;
  if (p.float_scales) {
    const bool fits = psumbook_bytes(PsumWord::kFloat, p.vec_len) <= gpu.shared_bytes;
    plan.word = wide || fits ? PsumWord::kFloat : PsumWord::kHalfFloat;
  } else if (p.io.M > 1 && p.accuracy <= Accuracy::kAccurate &&
             psumbook_bytes(PsumWord::kPair14, p.vec_len) <= gpu.shared_bytes) {
    plan.word = PsumWord::kPair14;
  }
  plan.tokens = word_tokens(plan.word);
  plan.tile_units = wide ? (4096 >> p.codebook_bits) : kTileUnits;
  plan.tiles = static_cast<int>(ceil_div(units.units, plan.tile_units));
  plan.splits = plan.word == PsumWord::kHalfFloat ? 2 * plan.tiles : plan.tiles;
  plan.shared_bytes = wide ? kWideShared : psumbook_bytes(plan.word, p.vec_len);
  plan.slab_tokens = static_cast<int>(std::min<int64_t>(p.io.M, kSlabTokens));

  // Blocks along N: as many as fill the device once, twice, .., whichever ends first.
  const int64_t chunks = ceil_div(p.io.N, kChunkRows), layers = ceil_div(plan.slab_tokens, plan.tokens);
  int64_t least = INT64_MAX;
  for (int waves = 1; waves <= 4; ++waves) {
    const int64_t fitting = int64_t(waves) * sm_count / (plan.splits * layers);
    const BlockPlan rows = deal_blocks(p.siblings, p.io.N, std::clamp<int64_t>(fitting, 1, chunks));
    const int64_t row_blocks = dealt_blocks(rows);
    const int64_t rounds = ceil_div(plan.splits * layers * row_blocks, sm_count);
    const int64_t clocks =
        rounds * (build_clocks(plan.word, 1 << p.codebook_bits, p.vec_len) + most_units(rows) * kChunkClocks);
    if (clocks < least) {
      least = clocks;
      plan.row_blocks = static_cast<int>(row_blocks);
      plan.rows = rows;
    }
  }
  return plan;
}

int64_t codegemm_workspace(const CodegemmProblem& p, const Gpu& gpu) {
  const CodegemmPlan plan = plan_codegemm(p, gpu);
  return int64_t(plan.splits) * plan.slab_tokens * p.io.N * 4;
}

void codegemm(const CodegemmProblem& p, const Gpu& gpu) {
  const CodegemmPlan plan = plan_codegemm(p, gpu);
  if (plan.shared_bytes > gpu.shared_bytes) {
    throw std::runtime_error("codegemm needs " + std::to_string(plan.shared_bytes) +
                             " bytes of shared memory, and a block of this GPU gets " +
                             std::to_string(gpu.shared_bytes));
  }
  const int element = p.io.dtype == DType::kFloat32 ? 4 : 2;
  const int chunks = static_cast<int>(ceil_div(p.io.N, kChunkRows));
  float* partial = static_cast<float*>(p.workspace);
  for (int64_t first = 0; first < p.io.M; first += plan.slab_tokens) {
    GpuIo io = p.io;
    io.M = std::min<int64_t>(plan.slab_tokens, p.io.M - first);
    io.x = static_cast<const unsigned char*>(p.io.x) + first * p.io.x_stride * element;
    io.y = static_cast<unsigned char*>(p.io.y) + first * p.io.N * element;
    PsumShape s{};
    s.units = codegemm_units(io.K, p.group_size, p.num_codebooks, p.vec_len);
    s.units_per_group_inverse = 1.f / static_cast<float>(s.units.units_per_group);
    s.num_codebooks_inverse = 1.f / static_cast<float>(p.num_codebooks);
    s.M = static_cast<int>(io.M), s.N = static_cast<int>(io.N), s.K = static_cast<int>(io.K);
    s.group_size = static_cast<int>(p.group_size);
    s.num_codebooks = p.num_codebooks, s.entries = 1 << p.codebook_bits, s.vec_len = p.vec_len;
    s.x = io.x, s.x_stride = io.x_stride, s.x_dtype = io.dtype;
    s.codebooks = p.codebooks, s.norms = p.norms;
    s.book_bytes = p.num_codebooks * s.entries * p.vec_len * (p.float_scales ? 4 : 2);
    const Gather gather{static_cast<const unsigned char*>(p.codes), static_cast<const unsigned char*>(p.scales), chunks,
                        plan.rows, partial};
    if (p.codebook_bits > 8) {
      launch_wide(s, gather, plan, gpu);
    } else if (is_float(plan.word)) {
      launch_float_tiles(s, gather, plan, gpu);
    } else if (plan.word == PsumWord::kPair14) {
      gather_parts::launch_tiles<PsumWord::kPair14>(s, gather, plan, gpu);
    } else {
      gather_parts::launch_tiles<PsumWord::kInt16>(s, gather, plan, gpu);
    }
    reduce_splits(io, partial, plan.splits, gpu);
  }
}

}  // namespace lutgemm::cuda
