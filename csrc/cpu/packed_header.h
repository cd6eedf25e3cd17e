// What the headers of both prepared BCQ layouts have in common. Included by their *_pack.cpp only.
#pragma once

#include <cstdint>

#include "../params.h"
#include "bcq.h"

namespace lutgemm {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Null when the fields that both headers have can be those of a weight, so that its sizes can be computed; else why
// not.
template <class Header>
const char* bcq_header_fault(const Header& h) {
  if (h.N < 1 || h.N > kMaxFeatures || h.K < 1 || h.K > kMaxFeatures) return "its header has an impossible N or K";
  if (h.group_size < 1 || h.group_size > kMaxFeatures || (h.group_size % 32 != 0 && h.group_size < h.K)) {
    return "its header has an impossible group size";
  }
  if (h.bits < 1 || h.bits > kMaxBits) return "its header has an impossible number of bits";
  if ((h.uniform | h.has_offsets) & ~1 || (h.uniform && h.has_offsets)) return "its header has an unknown kind";
  if (h.scale_dtype < int(DType::kFloat32) || h.scale_dtype > int(DType::kBFloat16)) {
    return "its header has an unknown scale dtype";
  }
  return nullptr;
}

}  // namespace lutgemm
