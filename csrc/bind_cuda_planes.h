// The checks that the two kernels which read the layout of bit_planes.py share.
#pragma once

#include "bind_cuda.h"
#include "cuda/bit_planes.h"

namespace lutgemm::cuda {

// Everything but io and workspace.
inline BitPlanesProblem checked_planes(const Tensor& x, const Tensor& packed, int64_t N, int64_t K, int64_t bits,
                                       bool merged, bool wide, bool has_offsets, int64_t steps) {
  check_range("N", N, 1, kMaxFeatures);
  check_range("K", K, 1, kMaxFeatures);
  check_range("bits", bits, 1, 8);
  check(steps == 1 || steps == 2 || steps == 4, "steps=", steps, ": must be 1, 2 or 4");
  check(!(merged && has_offsets), "has_offsets: the uniform kind has none");
  BitPlanesProblem p{};
  p.tiles = ceil_div(N, kPlanesTileRows), p.chunks = ceil_div(K, kPlanesChunk);
  p.bits = int(bits), p.merged = merged, p.wide = wide, p.has_offsets = has_offsets, p.steps = int(steps);
  check_tensor(packed, "packed", {p.tiles, p.chunks, p.unit_words()}, ScalarType::Int, x);
  p.packed = static_cast<const uint32_t*>(packed.const_data_ptr());
  return p;
}

}  // namespace lutgemm::cuda
