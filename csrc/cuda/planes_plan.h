// How bit_planes and sign_planes cut a problem into blocks, and what their kernels are told. Host code only.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/bit_planes.h"

namespace lutgemm::cuda {

// Words of a chunk of activations in shared memory: its fragments, then its factors.
inline int64_t chunk_words(const BitPlanesPlan& plan) { return round_up(plan.fragment_words + plan.factor_floats, 4); }

// Shared memory of a block, in this order; sizes in bytes.
struct PlanesShared {
  int64_t stage, ring, chunks, outputs, total;
};

inline PlanesShared planes_shared(const BitPlanesProblem& p, const BitPlanesPlan& plan) {
  PlanesShared s{};
  s.stage = 4 * p.unit_words() * plan.units_per_stage;
  s.ring = s.stage * kPlanesStages * plan.warps;
  s.chunks = plan.split_chunks * chunk_words(plan) * 4;
  s.outputs = int64_t(2) * plan.warps * plan.warp_floats * 4;
  s.total = s.ring + s.chunks + s.outputs;
  return s;
}

// Bytes of the activations that a kernel of their own prepares: [block of tokens][chunk][chunk_words] uint32.
inline int64_t prepared_bytes(const BitPlanesProblem& p, const BitPlanesPlan& plan) {
  return plan.separate ? ceil_div(p.io.M, plan.tokens) * p.chunks * chunk_words(plan) * 4 : 0;
}

// What can be divided on the host is: a division takes some 100 clocks, and several would go before the first copy.
struct PlanesArguments {
  BitPlanesProblem problem;
  BitPlanesPlan plan;
  uint32_t* prepared;  // of prepared_bytes, or null
  float* partial;      // [splits, M, N], or null for one split
  PlanesShared sizes;
  int unit_words, chunk_words, stage_bytes, warp_bits;  // plan.warps is 2^warp_bits
};

inline PlanesArguments planes_arguments(const BitPlanesProblem& p, const BitPlanesPlan& plan) {
  PlanesArguments made{};
  made.problem = p, made.plan = plan;
  auto* workspace = static_cast<unsigned char*>(p.workspace);
  if (plan.separate) made.prepared = reinterpret_cast<uint32_t*>(workspace);
  if (plan.splits > 1) made.partial = reinterpret_cast<float*>(workspace + prepared_bytes(p, plan));
  made.sizes = planes_shared(p, plan);
  made.unit_words = int(p.unit_words()), made.chunk_words = int(chunk_words(plan));
  made.stage_bytes = int(made.sizes.stage);
  while ((1 << made.warp_bits) < plan.warps) ++made.warp_bits;
  return made;
}

constexpr int kPlanesWarps = 8;
// Most bytes of a stage where shared memory has room, and else: 2 stages in flight of all warps are then at least 20 KB
// for each multiprocessor, and latency times bandwidth asks for 17 to 24 KB on H100 and H200. What a stage costs
// besides its units is more than a plane of a unit does, so the larger the better.
constexpr int64_t kPlanesStageBytes = 2560, kSmallStageBytes = 1280;
// Most bytes of activations in a block; more tokens times columns split K over blocks.
constexpr int64_t kPlanesActivationBytes = 64 << 10;
// Chunks of K a warp keeps at least when K is split to occupy more multiprocessors: fewer would not pay for the second
// kernel that adds the splits.
constexpr int64_t kFewestPlanesChunks = 4;

// Chunks of K times tokens of a block from which on a kernel of their own prepares the activations, once instead of in
// every block: at some 90 instructions each, in two blocks of a multiprocessor, that would take 3 microseconds, for
// which the first stages of codes keep the memory busy.
constexpr int64_t kSeparateChunks = 128;

// Completes a plan that has its token_tiles, tokens, terms, fragment_words, factor_floats and warp_floats. two_blocks:
// whether the registers of a multiprocessor hold two blocks. Throws std::runtime_error for a device with too little
// shared memory.
inline void cut_planes(const BitPlanesProblem& p, const Gpu& gpu, const char* name, bool two_blocks,
                       BitPlanesPlan& plan) {
  const int64_t chunk_bytes = 4 * (int64_t(plan.fragment_words) + plan.factor_floats);
  plan.splits = ceil_div(p.chunks, std::max<int64_t>(1, kPlanesActivationBytes / chunk_bytes));
  while (p.tiles * plan.splits < gpu.sm_count && p.chunks / (2 * plan.splits) >= kFewestPlanesChunks * kPlanesWarps) {
    plan.splits *= 2;
  }
  plan.split_chunks = ceil_div(p.chunks, plan.splits);
  plan.splits = ceil_div(p.chunks, plan.split_chunks);  // no split without chunks

  const auto fits = [&](int warps, int64_t stage_bytes, int64_t limit) {
    const int64_t own = ceil_div(plan.split_chunks, warps);  // units of a warp and tile, in batches of equal size
    const int64_t batches = ceil_div(own, std::max<int64_t>(1, stage_bytes / (4 * p.unit_words())));
    plan.warps = warps;
    plan.units_per_stage = int(ceil_div(own, batches));
    plan.shared_bytes = size_t(planes_shared(p, plan).total);
    return int64_t(plan.shared_bytes) <= limit;
  };
  constexpr int64_t kReserved = 1024;  // of a multiprocessor's shared memory, for each block
  const int64_t half = (gpu.shared_bytes + kReserved) / 2 - kReserved;
  const bool two =
      two_blocks && (fits(kPlanesWarps, kPlanesStageBytes, half) || fits(kPlanesWarps, kSmallStageBytes, half));
  bool one = two || fits(kPlanesWarps, kPlanesStageBytes, gpu.shared_bytes);
  for (int warps = kPlanesWarps; !one && warps > 0; warps /= 2) one = fits(warps, kSmallStageBytes, gpu.shared_bytes);
  if (!one) {
    throw std::runtime_error(std::string(name) + ": a block needs " + std::to_string(plan.shared_bytes) +
                             " bytes of shared memory, and the device has " + std::to_string(gpu.shared_bytes));
  }
  plan.separate = plan.split_chunks * plan.tokens >= kSeparateChunks;
  plan.blocks = std::min(p.tiles, std::max<int64_t>(1, (two ? 2 : 1) * gpu.sm_count / plan.splits));
}

}  // namespace lutgemm::cuda
