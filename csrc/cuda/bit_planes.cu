// Planes of bits on int8 tensor cores: planning and launching for both kinds, and the kernels of the free one.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/bit_planes.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

constexpr int kWarps = 8;
// Bytes of a stage: 3 stages in flight of 16 warps are then some 50 KB for each multiprocessor, above the 17 to 24 KB
// that latency times bandwidth asks for on H100 and H200.
constexpr int64_t kStageBytes = 1152;
// Most bytes of activations in a block; more tokens times columns split K over blocks.
constexpr int64_t kActivationBytes = 64 << 10;
// Chunks of K a warp keeps at least when K is split to occupy more multiprocessors: fewer would not pay for the second
// kernel that adds the splits.
constexpr int64_t kFewestChunks = 4;

}  // namespace

BitPlanesPlan plan_bit_planes(const BitPlanesProblem& p, const Gpu& gpu) {
  BitPlanesPlan plan{};
  plan.token_tiles = p.io.M <= 4 ? 1 : p.io.M <= 8 ? 2 : 4;
  plan.units_per_stage = int(std::max<int64_t>(1, kStageBytes / (4 * p.unit_words())));
  const int64_t tokens = std::min<int64_t>(p.io.M, 4 * plan.token_tiles);

  const int64_t activation_chunks = std::max<int64_t>(1, kActivationBytes / (tokens * (256 + 4 + 4 * p.steps)));
  plan.splits = ceil_div(p.chunks, activation_chunks);
  while (p.tiles * plan.splits < gpu.sm_count && p.chunks / (2 * plan.splits) >= kFewestChunks * kWarps) {
    plan.splits *= 2;
  }
  plan.split_chunks = ceil_div(p.chunks, plan.splits);
  plan.splits = ceil_div(p.chunks, plan.split_chunks);  // no split without chunks

  for (plan.warps = kWarps;; plan.warps /= 2) {
    const int64_t bytes = bit_planes_shared(p, plan).total;
    plan.shared_bytes = size_t(bytes);
    if (bytes <= gpu.shared_bytes) break;
    if (plan.warps == 1) {
      throw std::runtime_error("bit_planes: a block needs " + std::to_string(bytes) +
                               " bytes of shared memory, and the device has " + std::to_string(gpu.shared_bytes));
    }
  }
  constexpr int64_t kReserved = 1024;  // of a multiprocessor's shared memory, for each block
  const bool two = plan.token_tiles < 4 && (int64_t(plan.shared_bytes) + kReserved) * 2 <= gpu.shared_bytes + kReserved;
  plan.blocks = std::min(p.tiles, std::max<int64_t>(1, (two ? 2 : 1) * gpu.sm_count / plan.splits));
  return plan;
}

int64_t bit_planes_workspace(const BitPlanesProblem& p, const Gpu& gpu) {
  return split_workspace(p.io, plan_bit_planes(p, gpu).splits);
}

void bit_planes(const BitPlanesProblem& p, const Gpu& gpu) {
  const BitPlanesPlan plan = plan_bit_planes(p, gpu);
  float* partial = plan.splits > 1 ? static_cast<float*>(p.workspace) : nullptr;
  const int64_t token_blocks = ceil_div(p.io.M, 4 * plan.token_tiles);
  const LaunchShape shape{dim3(unsigned(plan.blocks), unsigned(plan.splits), unsigned(token_blocks)),
                          dim3(unsigned(plan.warps * kWarpSize)), plan.shared_bytes, gpu.stream, true};
  if (p.merged) {
    launch_merged_planes(p, plan, partial, shape);
  } else {
    launch_bit_planes<false>(p, plan, partial, shape);
  }
  if (partial != nullptr) reduce_splits(p.io, partial, plan.splits, gpu);
}

}  // namespace lutgemm::cuda
