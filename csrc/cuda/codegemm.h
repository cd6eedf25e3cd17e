// CodeGEMM for codebook weights: look-ups in a Psumbook (codegemm.cu). No torch and no CUDA header here.
#pragma once

#include <cstdint>

#include "cuda/problem.h"
#include "cuda/siblings.h"

namespace lutgemm::cuda {

// How codegemm divides a weight. A column is one code of every row: codebook c of slice j. Columns of a group are
// numbered jj * num_codebooks + c, jj = j within the group, and four in a row make a unit; the last unit of a group is
// filled up with code 0, whose table entries are zero. So a unit has one scale per row.
constexpr int kUnitColumns = 4;

struct CodegemmUnits {
  int group_vectors;    // slices of a whole group
  int groups;           // G
  int units_per_group;  // of a whole group; only the last group may have fewer
  int units;            // of a row
};

constexpr CodegemmUnits codegemm_units(int64_t K, int64_t group_size, int num_codebooks, int vec_len) {
  const int64_t J = ceil_div(K, vec_len);
  const int64_t group_vectors = group_size < K ? group_size / vec_len : J;
  const int64_t groups = ceil_div(J, group_vectors), last = J - (groups - 1) * group_vectors;
  const int64_t whole = ceil_div(group_vectors * num_codebooks, kUnitColumns);
  const int64_t units = (groups - 1) * whole + ceil_div(last * num_codebooks, kUnitColumns);
  return CodegemmUnits{int(group_vectors), int(groups), int(whole), int(units)};
}

// Rows are padded to whole chunks: one row for each lane of a warp.
constexpr int kChunkRows = 32;
static_assert(kChunkRows == kSiblingRows);

// codes, up to 8 codebook_bits (codegemm): uint8 [ceil(units / 32)][rows / 4][32 units][4 rows][4 columns]
//        above (codegemm_wide):            uint16 [units][rows][4 columns]
struct CodegemmProblem {
  GpuIo io;
  int64_t group_size;
  int num_codebooks, vec_len, codebook_bits;
  Accuracy accuracy;
  const void* codes;
  const void* scales;     // [G][padded rows]: fp32 as stored, or fp16 to be multiplied by scale_unit
  bool float_scales;      // fp32: what is to be exact, fp32 weights, 3 codebooks, codegemm_wide
  const void* codebooks;  // [num_codebooks][1 << codebook_bits][vec_len]: fp32, or beside fp16 scales fp16 in units of
                          // book_unit, at least 8 entries, the largest value of each codebook from 1 to 2
  const float* norms;     // [num_codebooks]: the largest Euclidean norm of a centroid of each; then scale_unit, and
                          // [num_codebooks] book_unit
  Siblings siblings;      // codebooks and norms are those of each, one after another
  void* workspace;
};

// What the entries of a table are: kFloat for fp32 scales, or kHalfFloat, whose blocks take 2 columns of each unit,
// where shared memory has no room for 4; for other scales kPair14 where tokens come in pairs and accuracy is at most
// kAccurate, else kInt16.
enum class PsumWord : int { kFloat = 0, kInt16 = 1, kPair14 = 2, kHalfFloat = 3 };

struct CodegemmPlan {
  PsumWord word;
  int tokens;       // of a pass
  int tile_units;   // of a block
  int tiles;        // along K
  int splits;       // blocks along K, and of the workspace: tiles, or halves of tiles
  int row_blocks;   // blocks along N
  BlockPlan rows;   // of each
  int slab_tokens;  // of a launch; the grid has slab_tokens / tokens layers
  int64_t shared_bytes;
};

CodegemmPlan plan_codegemm(const CodegemmProblem& p, const Gpu& gpu);
int64_t codegemm_workspace(const CodegemmProblem& p, const Gpu& gpu);
void codegemm(const CodegemmProblem& p, const Gpu& gpu);

// The launches of codegemm_float.cu.
struct PsumShape;
struct Gather;
constexpr int kWideShared = (4096 * kUnitColumns + 8 * kUnitColumns * 16) * 4;  // codegemm_wide: tables, x of 8 units
void launch_float_tiles(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu);
void launch_wide(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu);

}  // namespace lutgemm::cuda
