// Sibling layers stacked along N whose weights have codebooks of their own: which rows, and which blocks, are whose.
//
//   rows     | sibling 0      | sibling 1  | sibling 2      in units of 32: a unit is one sibling's alone
//   blocks   | 0 1 2 3        | 4 5        | 6 7 8          a block serves rows of one sibling, with one set of tables
//
// One weight is one sibling.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/problem.h"

namespace lutgemm::cuda {

constexpr int kMostSiblings = 4;
constexpr int kSiblingRows = 32;  // a sibling begins at a multiple

struct Siblings {
  int count = 1;
  int64_t ends[kMostSiblings] = {};  // rows; of `count` siblings, where there are several
};

// Units of 32 rows and blocks of one sibling.
struct SiblingBlocks {
  int first_unit, units;
  int first_block, blocks;
  int block_units, longer;  // units / blocks, and the rest
};

struct BlockPlan {
  SiblingBlocks of[kMostSiblings];  // behind the last sibling: first_block = 2^31 - 1
};

// At most `blocks` blocks, but one for each sibling at least, dealt to N rows: shares by units, what is left to whom
// has most.
inline BlockPlan deal_blocks(const Siblings& siblings, int64_t N, int64_t blocks) {
  BlockPlan plan{};
  int64_t begin = 0;
  const int64_t all = ceil_div(N, kSiblingRows);
  int left = static_cast<int>(blocks);
  for (int i = 0; i < kMostSiblings; ++i) {
    SiblingBlocks& own = plan.of[i];
    if (i >= siblings.count) {
      own.first_block = INT32_MAX;
      continue;
    }
    const int64_t end = i + 1 < siblings.count ? siblings.ends[i] / kSiblingRows : all;
    own.first_unit = static_cast<int>(begin), own.units = static_cast<int>(end - begin);
    own.blocks = static_cast<int>(std::clamp<int64_t>(blocks * own.units / all, 1, std::max(own.units, 1)));
    left -= own.blocks;
    begin = end;
  }
  for (; left > 0; --left) {
    SiblingBlocks* most = nullptr;
    for (SiblingBlocks& own : plan.of) {
      if (own.blocks < own.units && (!most || int64_t(own.units) * most->blocks > int64_t(most->units) * own.blocks)) {
        most = &own;
      }
    }
    if (!most) break;
    ++most->blocks;
  }
  int first_block = 0;
  for (int i = 0; i < siblings.count; ++i) {
    SiblingBlocks& own = plan.of[i];
    own.first_block = first_block;
    first_block += own.blocks;
    own.block_units = own.units / own.blocks, own.longer = own.units % own.blocks;
  }
  return plan;
}

// Blocks of `units` units each, the last of a sibling filled up.
inline BlockPlan whole_blocks(const Siblings& siblings, int64_t N, int units) {
  BlockPlan plan = deal_blocks(siblings, N, 1);
  int first_block = 0;
  for (int i = 0; i < siblings.count; ++i) {
    SiblingBlocks& own = plan.of[i];
    own.first_block = first_block;
    own.blocks = static_cast<int>(ceil_div(own.units, units));
    own.block_units = units, own.longer = 0;
    first_block += own.blocks;
  }
  return plan;
}

inline int dealt_blocks(const BlockPlan& plan) {
  int blocks = 0;
  for (const SiblingBlocks& own : plan.of) blocks += own.blocks;
  return blocks;
}

// Units of the block that has most.
inline int most_units(const BlockPlan& plan) {
  int most = 0;
  for (const SiblingBlocks& own : plan.of) most = std::max(most, own.block_units + (own.longer > 0 ? 1 : 0));
  return most;
}

// Of a block: which sibling it serves, and what that one has. No array is indexed at run time, and none copied:
// compilers unroll the loop (a host compiler reads this too, hence no pragma).
struct OwnBlocks {
  int sibling;
  SiblingBlocks blocks;
  int number;  // of the block, among its sibling's

  LUTGEMM_ANYWHERE int first_unit() const {
    const int shorter = number < blocks.longer ? number : blocks.longer;
    return blocks.first_unit + number * blocks.block_units + shorter;
  }
  LUTGEMM_ANYWHERE int end_unit() const { return first_unit() + blocks.block_units + (number < blocks.longer ? 1 : 0); }
};

LUTGEMM_ANYWHERE inline OwnBlocks own_blocks(const BlockPlan& plan, int block) {
  OwnBlocks own{0, plan.of[0], 0};
  for (int i = 1; i < kMostSiblings; ++i) {
    if (block >= plan.of[i].first_block) own = OwnBlocks{i, plan.of[i], 0};
  }
  own.number = block - own.blocks.first_block;
  return own;
}

}  // namespace lutgemm::cuda
