// How LUT-GEMM and BiQGEMM cut a problem into blocks: a search over a model of the clocks that it takes. Host code.
//
// The model counts issue slots (lut_tables.cuh derives them) and says how well the blocks that a multiprocessor runs at
// once fill them and keep loads under way: one block has 8 warps and 16 KB, two have 32 KB. It leaves memory aside;
// cuts that are even in instructions are even in bytes. Constants are estimates, not measured: they only have to rank
// cuts.
#include <algorithm>

#include "cuda/lut.h"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 8;            // of a block
constexpr int kMostResults = 4096;   // fp32 results of a block in shared memory: 16 KB
constexpr int kMostBlocksPerSm = 6;  // three times what runs at once: beyond it only the number of builds grows
constexpr int64_t kMostSplits = 1024;
constexpr double kIssued = 4;  // warp instructions a clock
constexpr double kBuild = 190, kBuildLatency = 250, kStep = 40, kTile = 90, kStart = 500;
constexpr int kResident = 2;                           // blocks that run at once
constexpr double kFilled[kResident] = {0.6, 0.85};     // of the issue slots, by 1 and 2 blocks
constexpr double kReduce = 700, kReduceElements = 16;  // clocks; partial sums a clock and multiprocessor

// Of a multiprocessor that takes `blocks` of them.
double sm_clocks(int64_t blocks, int64_t tiles, int64_t tables_of_block, int bits, const LutTables& tables) {
  const double words = 64.0 / tables.entry_bytes, word = 15 + 4 * tables.tokens;
  const double tile = bits * (words * word + kStep) + kTile;
  const double warps = kWarps / kIssued;
  const double block = kStart + tables_of_block * (kBuildLatency + warps * (kBuild + ceil_div(tiles, kWarps) * tile));
  return blocks * block / kFilled[std::min<int64_t>(blocks, kResident) - 1];
}

}  // namespace

LutPlan plan_lut(int64_t M, int64_t N, int64_t K, int bits, const LutTables& tables, int sm_count) {
  const int64_t all_tiles = ceil_div(N, kTileRows), all_tables = ceil_div(K, tables.inputs());
  const int64_t token_blocks = ceil_div(M, tables.tokens);
  const int64_t most_tiles = kMostResults / tables.tokens / kTileRows;
  LutPlan best{};
  double least = -1;
  for (int64_t splits = 1; splits <= std::min(all_tables, kMostSplits); ++splits) {
    const int64_t tables_per_split = ceil_div(all_tables, splits);
    if (ceil_div(all_tables, tables_per_split) != splits) continue;  // a smaller number of splits does the same
    const double added = splits == 1 ? 0 : kReduce + double(splits) * M * N / (kReduceElements * sm_count);
    for (int per_sm = 1; per_sm <= kMostBlocksPerSm; ++per_sm) {
      const int64_t wanted = std::max<int64_t>(1, int64_t(per_sm) * sm_count / (splits * token_blocks));
      const int64_t tiles = std::min(most_tiles, ceil_div(all_tiles, wanted));
      const LutPlan plan{ceil_div(all_tiles, tiles), tiles, splits, tables_per_split, token_blocks};
      const int64_t most_blocks = ceil_div(plan.blocks(), sm_count);
      const double clocks = sm_clocks(most_blocks, tiles, tables_per_split, bits, tables) + added;
      if (least < 0 || clocks < least) least = clocks, best = plan;
    }
    if (splits * token_blocks > kMostBlocksPerSm * int64_t(sm_count)) break;  // more would only cost more
  }
  return best;
}

}  // namespace lutgemm::cuda
