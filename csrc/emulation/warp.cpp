// Collectives of a warp: shuffles, votes, reductions, mma and ldmatrix.
#include <cstring>

#include "emulation/block.h"
#include "emulation/clocks.h"
#include "emulation/float16.h"
#include "emulation/memory.h"
#include "emulation/sites.h"

namespace emulation {

namespace {

bool same(const Thread& a, const Thread& b) {
  return a.mask == b.mask && a.site.line == b.site.line && !std::strcmp(a.waits_for, b.waits_for) &&
         (a.site.file == b.site.file || !std::strcmp(a.site.file, b.site.file));
}

Slot& own_slot() { return current_warp().slots[block.current % kLanes]; }

template <typename Function>
void for_lanes(unsigned mask, Function function) {
  for (; mask; mask &= mask - 1) function(static_cast<unsigned>(__builtin_ctz(mask)));
}

// Orders the memory accesses of these lanes before it with those after it.
void combine_sync(Slot*, unsigned mask, uint32_t) {
  ++current_warp().order;
  order_lanes(mask);
}

// in: source lane, value (2 words).
void combine_shuffle(Slot* lanes, unsigned mask, uint32_t) {
  for_lanes(mask, [&](unsigned l) {
    const uint32_t source = lanes[l].in[0];
    if (!(mask >> source & 1u)) {
      const unsigned warp = block.current / kLanes;
      fail("shuffle: " + thread_name(warp * kLanes + l) + " reads lane " + std::to_string(source) +
           ", which does not take part, at " + describe_site(current_thread().site));
    }
    lanes[l].out[0] = lanes[source].in[1];
    lanes[l].out[1] = lanes[source].in[2];
  });
}

void combine_word(Slot* lanes, unsigned mask, uint32_t argument) {
  const auto op = static_cast<WarpOp>(argument);
  if (op == WarpOp::kMatch) {
    for_lanes(mask, [&](unsigned l) {
      lanes[l].out[0] = 0;
      for_lanes(mask, [&](unsigned other) {
        if (lanes[other].in[0] == lanes[l].in[0]) lanes[l].out[0] |= 1u << other;
      });
    });
    return;
  }
  uint32_t result = op == WarpOp::kBallot ? 0 : lanes[__builtin_ctz(mask)].in[0];
  const unsigned rest = op == WarpOp::kBallot ? mask : mask & (mask - 1);
  for_lanes(rest, [&](unsigned l) {
    const uint32_t value = lanes[l].in[0];
    const auto a = static_cast<int32_t>(result), b = static_cast<int32_t>(value);
    if (op == WarpOp::kBallot) result |= value << l;
    if (op == WarpOp::kAdd) result += value;
    if (op == WarpOp::kMax) result = a > b ? result : value;
    if (op == WarpOp::kMin) result = a < b ? result : value;
    if (op == WarpOp::kUnsignedMax) result = result > value ? result : value;
    if (op == WarpOp::kUnsignedMin) result = result < value ? result : value;
  });
  for_lanes(mask, [&](unsigned l) { lanes[l].out[0] = result; });
}

void need_whole_warp(const char* name, unsigned mask) {
  if (mask != ~0u || current_warp().lanes != ~0u) {
    fail(std::string(name) + ": needs all 32 lanes of the warp, at " + describe_site(current_thread().site));
  }
}

float value16(uint32_t word, unsigned half, bool bfloat16) {
  const auto bits = static_cast<uint16_t>(word >> 16 * half);
  return bfloat16 ? bfloat16_value(bits) : half_value(bits);
}

// d += a b, in T: fp32 with k ascending, or integers that wrap around.
template <unsigned kK, typename T>
void multiply(const T (&a)[16][kK], const T (&b)[kK][8], Slot* lanes) {
  T d[16][8];
  const auto of_lane = [&d](unsigned l, unsigned i) { return &d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]; };
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned i = 0; i < 4; ++i) *of_lane(l, i) = bit_cast<T>(lanes[l].in[6 + i]);
  }
  for (unsigned m = 0; m < 16; ++m) {
    for (unsigned k = 0; k < kK; ++k) {
      for (unsigned n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned i = 0; i < 4; ++i) lanes[l].out[i] = bit_cast<uint32_t>(*of_lane(l, i));
  }
}

// in: a[4], b[2], d[4]; out: d[4]. ptx.cuh draws which lane holds what.
void combine_mma(Slot* lanes, unsigned mask, uint32_t argument) {
  const auto kind = static_cast<MmaKind>(argument);
  need_whole_warp("mma", mask);
  if (kind == MmaKind::kF16 || kind == MmaKind::kBF16) {
    const bool bfloat16 = kind == MmaKind::kBF16;
    float a[16][16], b[16][8];
    for (unsigned l = 0; l < kLanes; ++l) {
      const unsigned group = l / 4, t = l % 4;
      for (unsigned half = 0; half < 2; ++half) {
        for (unsigned i = 0; i < 4; ++i) {
          a[group + i % 2 * 8][2 * t + half + i / 2 * 8] = value16(lanes[l].in[i], half, bfloat16);
        }
        for (unsigned i = 0; i < 2; ++i) b[2 * t + half + 8 * i][group] = value16(lanes[l].in[4 + i], half, bfloat16);
      }
    }
    multiply<16, float>(a, b, lanes);
    return;
  }
  const bool signed_a = kind == MmaKind::kS8S8 || kind == MmaKind::kS8U8;
  const bool signed_b = kind == MmaKind::kS8S8 || kind == MmaKind::kU8S8;
  const auto value8 = [](uint32_t word, unsigned byte, bool is_signed) {
    const auto bits = static_cast<uint8_t>(word >> 8 * byte);
    return static_cast<uint32_t>(is_signed ? static_cast<int8_t>(bits) : bits);
  };
  uint32_t a[16][32], b[32][8];
  for (unsigned l = 0; l < kLanes; ++l) {
    const unsigned group = l / 4, t = l % 4;
    for (unsigned byte = 0; byte < 4; ++byte) {
      for (unsigned i = 0; i < 4; ++i) {
        a[group + i % 2 * 8][4 * t + byte + i / 2 * 16] = value8(lanes[l].in[i], byte, signed_a);
      }
      for (unsigned i = 0; i < 2; ++i) b[4 * t + byte + 16 * i][group] = value8(lanes[l].in[4 + i], byte, signed_b);
    }
  }
  multiply<32, uint32_t>(a, b, lanes);
}

// in: the row this lane loaded (4 words, of matrix lane / 8); out[i]: this lane's pair of matrix i.
void combine_ldmatrix(Slot* lanes, unsigned mask, uint32_t argument) {
  const bool transposed = argument & 256u;
  const unsigned matrices = argument & 255u;
  need_whole_warp("ldmatrix", mask);
  const auto element = [&](unsigned matrix, unsigned row, unsigned column) {
    return lanes[matrix * 8 + row].in[column / 2] >> column % 2 * 16 & 0xffffu;
  };
  for (unsigned l = 0; l < kLanes; ++l) {
    for (unsigned i = 0; i < matrices; ++i) {
      const unsigned row = l / 4, column = l % 4 * 2;
      lanes[l].out[i] = transposed ? element(i, column, row) | element(i, column + 1, row) << 16
                                   : element(i, row, column) | element(i, row, column + 1) << 16;
    }
  }
}

}  // namespace

void collective(Combine combine, const char* name, unsigned mask, uint32_t argument, Site site) {
  Warp& warp = current_warp();
  Thread& thread = current_thread();
  const unsigned bit = 1u << block.current % kLanes, first = block.current / kLanes * kLanes;
  thread.waits_for = name;
  thread.site = site;
  thread.mask = mask;
  if (!(mask & bit)) fail(std::string(name) + ": " + thread_name(block.current) + " is not in its own mask");
  const unsigned needed = mask & warp.lanes;
  warp.ready &= ~bit;
  warp.in_collective |= bit;
  if ((warp.in_collective & needed) != needed) {
    yield();
    return;
  }
  for_lanes(needed, [&](unsigned l) {
    const Thread& other = block.threads[first + l];
    if (!same(other, thread)) {
      fail("divergence: " + thread_name(first + l) + " is in " + other.waits_for + " at " + describe_site(other.site) +
           ", " + thread_name(block.current) + " in " + name + " at " + describe_site(site));
    }
  });
  combine(warp.slots, needed, argument);
  count_flush(block.current / kLanes);
  warp.in_collective &= ~needed;
  warp.ready |= needed;
  memory_switch();
}

void sync_warp(unsigned mask, Site site) { collective(combine_sync, "__syncwarp", mask, 0, site); }

uint64_t shuffle(const char* name, unsigned mask, uint64_t value, uint32_t source_lane, Site site) {
  Slot& slot = own_slot();
  slot.in[0] = source_lane;
  std::memcpy(slot.in + 1, &value, sizeof(value));
  collective(combine_shuffle, name, mask, 0, site);
  std::memcpy(&value, slot.out, sizeof(value));
  return value;
}

uint32_t warp_op(WarpOp op, const char* name, unsigned mask, uint32_t value, Site site) {
  Slot& slot = own_slot();
  slot.in[0] = value;
  collective(combine_word, name, mask, static_cast<uint32_t>(op), site);
  return slot.out[0];
}

void mma(MmaKind kind, void* d, const uint32_t* a, const uint32_t* b, Site site) {
  Slot& slot = own_slot();
  std::memcpy(slot.in, a, 16);
  std::memcpy(slot.in + 4, b, 8);
  std::memcpy(slot.in + 6, d, 16);
  collective(combine_mma, "mma", ~0u, static_cast<uint32_t>(kind), site);
  std::memcpy(d, slot.out, 16);
}

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
  Slot& slot = own_slot();
  // Only the lanes that address a row read it.
  if (block.current % kLanes < 8u * static_cast<unsigned>(matrices)) {
    memory_access({reinterpret_cast<uintptr_t>(row), 16, false, false, __builtin_return_address(0)});
    std::memcpy(slot.in, row, 16);
  }
  collective(combine_ldmatrix, "ldmatrix", ~0u, static_cast<uint32_t>(matrices) | (transposed ? 256u : 0u), site);
  std::memcpy(r, slot.out, 4 * static_cast<size_t>(matrices));
}

}  // namespace emulation
