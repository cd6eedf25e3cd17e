// LUT-GEMM and BiQGEMM: what their launchers take, and how a problem is cut into blocks. Host code only.
//
// Both read one layout of the weight (lutgemm/backends/gpu_layouts/lut.py):
//
//   codes  uint32 [row tiles][K units][bits][4][32][4]: tile of 16 rows, unit of 1024 inputs, plane, rows 4j..4j+3,
//   word
//          (32 inputs), row. Byte s of a word is slice s (8 inputs) in folded form: bit 7 says that the slice is
//          negated, bits 0..6 are the signs of inputs 0..6 after that (1 is plus), input 7 is then plus.
//   scales fp16 or fp32 [row tiles][K units][terms][4][slots][4]: quad of rows, the i-th group that the unit touches,
//   row.
//          Terms are the planes' scales, then the offsets if there are any; of the uniform kind s / 2 and
//          2 * ((2^bits - 1) / 2 - zero). All but the last are in units of *scale_unit, a power of two.
//
// Rows, inputs and slots are padded; padding has scale 0, or meets an x of 0.
#pragma once

#include <cstdint>

#include "cuda/problem.h"

namespace lutgemm::cuda {

constexpr int kTileRows = 16;
constexpr int kLutTableBytes = 64 * 1024;
constexpr int kUnitInputs = 1024;
constexpr int kWordInputs = 32;
constexpr int kPlaneWords = kTileRows * kUnitInputs / kWordInputs;  // words of a plane of a tile and unit

struct LutProblem {
  GpuIo io;
  const uint32_t* codes;
  const void* scales;
  const float* scale_unit;
  int64_t group_size;
  int bits;          // 1..8
  int slots;         // >= 1
  bool uniform;      // terms of the uniform kind; then there are offsets, and no wide_scales
  bool offsets;      // there is a term for offsets
  bool wide_scales;  // fp32, else fp16
  Accuracy accuracy;
  void* workspace;  // of *_workspace() bytes
};

// How a kernel cuts the problem: a block's tables hold some tokens and inputs, and always take 64 KiB, so more tokens
// mean fewer inputs at a time. Its warps take a strip of rows each at a time.
struct LutTables {
  int tokens, inputs;
  int warps, strip_rows;
  int result_bytes;  // of a row, in shared memory
  int static_bytes;  // of shared memory, besides tables and results
  int most_blocks;   // that the registers of a multiprocessor hold

  int64_t shared_bytes(int64_t strips) const;  // of a block
};

// A grid of token_blocks, row_blocks, splits. A block takes strips_per_block strips of rows and tables_per_split
// tables' worth of inputs, one after the other. A multiprocessor holds resident blocks at once.
struct LutPlan {
  int64_t row_blocks, strips_per_block;
  int64_t splits, tables_per_split;
  int64_t token_blocks;
  int64_t resident;

  int64_t blocks() const { return row_blocks * token_blocks * splits; }
};

LutPlan plan_lut(const GpuIo& io, int bits, const LutTables& tables, const Gpu& gpu);

// One token a block.
LutTables lut_gemm_tables(const LutProblem& problem);
int64_t lut_gemm_workspace(const LutProblem& problem, const Gpu& gpu);
void lut_gemm(const LutProblem& problem, const Gpu& gpu);

// Several tokens a block, up to 16.
LutTables biqgemm_tables(const LutProblem& problem);
int64_t biqgemm_workspace(const LutProblem& problem, const Gpu& gpu);
void biqgemm(const LutProblem& problem, const Gpu& gpu);

}  // namespace lutgemm::cuda
