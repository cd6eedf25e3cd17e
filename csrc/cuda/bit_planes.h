// BCQ on int8 tensor cores: planes of bits (or the integers of the uniform kind) against activations of two int8 terms.
#pragma once

#include <cstddef>

#include "cuda/problem.h"

namespace lutgemm::cuda {

constexpr int kPlanesTileRows = 16;  // rows of W in a unit: the M side of an mma
constexpr int kPlanesChunk = 128;    // columns of W in a unit: 4 mma of 32
constexpr int kPlanesTokens = 16;    // most tokens of one pass over the weights
constexpr int kPlanesStages = 3;     // of a warp's ring of units in shared memory

// The layout is gpu_layouts/bit_planes.py's: packed [tiles, chunks, unit_words] uint32.
struct BitPlanesProblem {
  GpuIo io;
  const uint32_t* packed;
  int64_t tiles, chunks;  // ceil(N / 16), ceil(K / 128)
  int bits;
  bool merged;       // the uniform kind: planes stored as fields of integers
  bool wide;         // scales in fp32, else fp16
  bool has_offsets;  // not with merged
  int steps;         // groups (or parts of one) in a chunk: 1, 2 or 4
  void* workspace;   // of bit_planes_workspace bytes

  // Numbers per row and step: a scale for each plane and the offset; merged: s and the zero.
  LUTGEMM_ANYWHERE int slots() const { return merged ? 2 : bits + int(has_offsets); }
  LUTGEMM_ANYWHERE int64_t unit_words() const {
    return int64_t(64) * bits + (int64_t(steps) * slots() * kPlanesTileRows >> (wide ? 0 : 1));
  }
};

struct BitPlanesPlan {
  int token_tiles;       // n tiles of an mma
  int tokens;            // of a block: of one pass over the weights
  int terms;             // n columns of a token
  int fragment_words;    // activations of a chunk in shared memory
  int factor_floats;     // what goes with them
  int warp_floats;       // sums of a warp for a tile
  int warps;             // of a block; they share the chunks of a tile
  int units_per_stage;   // copied together
  int64_t splits;        // of the chunks over blocks
  int64_t split_chunks;  // of every split but the last
  int64_t blocks;        // over the tiles; each takes every blocks-th
  bool separate;         // a kernel before this one prepares the activations
  size_t shared_bytes;
};

// Throws std::runtime_error for a device with too little shared memory.
BitPlanesPlan plan_bit_planes(const BitPlanesProblem& problem, const Gpu& gpu);

int64_t bit_planes_workspace(const BitPlanesProblem& problem, const Gpu& gpu);

// y = x @ W.T + bias for any M; 16 tokens read the weights once.
void bit_planes(const BitPlanesProblem& problem, const Gpu& gpu);

}  // namespace lutgemm::cuda
