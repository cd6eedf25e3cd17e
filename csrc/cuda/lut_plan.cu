// How LUT-GEMM and BiQGEMM cut a problem into blocks: a search over a model of the clocks that it takes. Host code.
//
// The model counts issue slots and wavefronts (lut_tables.cuh derives them) and says how well the warps that a
// multiprocessor holds at once fill them. It leaves memory aside; cuts that are even in instructions are even in bytes.
// Constants are estimates, not measured: they only have to rank cuts.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/lut.h"

namespace lutgemm::cuda {
namespace {

constexpr int kMostBlocksPerSm = 6;  // three times what runs at once: beyond it only the number of builds grows
constexpr int64_t kMostSplits = 1024;
constexpr int kReserved = 1024;  // bytes of shared memory that a multiprocessor keeps for itself, for each block
constexpr double kIssued = 4;    // warp instructions a clock
// Issue slots: of all warps for tables; of one warp for its start, for its x and next tables, for a word of a lane, for
// a plane, and for a strip and each sum of a lane in it.
constexpr double kBuild = 2400, kStart = 160, kStage = 100;
constexpr double kWord = 18, kWordToken = 4.4, kPlane = 8, kStrip = 62, kStripSum = 11;
constexpr double kBuildWavefronts = 512;
constexpr double kStartLatency = 1200, kTableLatency = 700;  // clocks: of a block, and of each table after its first
constexpr double kFew = 0.6, kMany = 0.85;                   // of the issue slots that 8, 16 warps fill
constexpr double kReduce = 700, kReduceElements = 16;        // clocks; partial sums a clock and multiprocessor

// Of all shared memory of a multiprocessor, which is what a block can have and what is kept for that block.
int64_t sm_shared(const Gpu& gpu) { return gpu.shared_bytes + kReserved; }

int64_t resident_blocks(const LutTables& tables, int64_t strips, const Gpu& gpu) {
  return std::min<int64_t>(tables.most_blocks, sm_shared(gpu) / (tables.shared_bytes(strips) + kReserved));
}

// The most strips with which a multiprocessor holds that many blocks; less than 1 where it never does.
int64_t most_strips(const LutTables& tables, int blocks, const Gpu& gpu) {
  const int64_t room = sm_shared(gpu) / blocks - kReserved - tables.shared_bytes(0);
  return room / (tables.strip_rows * tables.result_bytes);
}

// Of a multiprocessor that takes `blocks` of them, as many as it holds at a time.
double sm_clocks(int64_t blocks, const LutPlan& plan, int bits, const LutTables& tables) {
  const double entry_bytes = 4096.0 / tables.inputs, words = tables.strip_rows * tables.inputs / 1024.0;  // of a lane
  const double word = std::max((kWord + kWordToken * tables.tokens) / kIssued, entry_bytes);
  const double strip =
      (bits * (words * word * kIssued + kPlane) + kStrip + kStripSum * words * tables.tokens) / kIssued;
  const double table = std::max(kBuild / kIssued, kBuildWavefronts) + tables.warps * kStage / kIssued +
                       ceil_div(plan.strips_per_block, tables.warps) * tables.warps * strip;
  const double block = tables.warps * kStart / kIssued + plan.tables_per_split * table;
  const double waits = kStartLatency + (plan.tables_per_split - 1) * kTableLatency;
  const auto together = [&](int64_t some) {
    return some * block / (some * tables.warps > 8 ? kMany : kFew) + (some > 0 ? waits : 0);
  };
  return blocks / plan.resident * together(plan.resident) + together(blocks % plan.resident);
}

}  // namespace

int64_t LutTables::shared_bytes(int64_t strips) const {
  return kLutTableBytes + static_bytes + strips * strip_rows * result_bytes;
}

LutPlan plan_lut(const GpuIo& io, int bits, const LutTables& tables, const Gpu& gpu) {
  const int64_t all_strips = ceil_div(io.N, tables.strip_rows), all_tables = ceil_div(io.K, tables.inputs);
  const int64_t token_blocks = ceil_div(io.M, tables.tokens);
  LutPlan best{};
  double least = -1;
  for (int64_t splits = 1; splits <= std::min(all_tables, kMostSplits); ++splits) {
    const int64_t tables_per_split = ceil_div(all_tables, splits);
    if (ceil_div(all_tables, tables_per_split) != splits) continue;  // a smaller number of splits does the same
    const double added = splits == 1 ? 0 : kReduce + double(splits) * io.M * io.N / (kReduceElements * gpu.sm_count);
    for (int resident = 1; resident <= tables.most_blocks; ++resident) {
      const int64_t most = most_strips(tables, resident, gpu);
      if (most < 1) break;
      for (int per_sm = 1; per_sm <= kMostBlocksPerSm; ++per_sm) {
        const int64_t wanted = std::max<int64_t>(1, int64_t(per_sm) * gpu.sm_count / (splits * token_blocks));
        const int64_t strips = std::min(most, ceil_div(all_strips, wanted));
        const LutPlan plan{ceil_div(all_strips, strips),        strips, splits, tables_per_split, token_blocks,
                           resident_blocks(tables, strips, gpu)};
        const double clocks = sm_clocks(ceil_div(plan.blocks(), gpu.sm_count), plan, bits, tables) + added;
        if (least < 0 || clocks < least) least = clocks, best = plan;
      }
    }
    if (splits * token_blocks > kMostBlocksPerSm * int64_t(gpu.sm_count)) break;  // more would only cost more
  }
  if (least < 0) {
    throw std::runtime_error("lut: a block needs " + std::to_string(tables.shared_bytes(1)) +
                             " bytes of shared memory, and the device has " + std::to_string(gpu.shared_bytes));
  }
  return best;
}

}  // namespace lutgemm::cuda
