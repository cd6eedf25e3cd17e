// CodeGEMM (NeurIPS 2025): y[m, n] = bias[n] + sum over units u of scales[n, g(u)] * sum over the unit's 4 columns q of
// psumbook[m, q][codes[n, q]]. psumbook.cuh has the table, codegemm.h the order of columns.
//
// A block makes the table of one tile (32 units, K * num_codebooks / vec_len = 128 columns) and streams its rows past:
//
//   codes   [tile][rows / 4][32 lanes][4 rows][4 columns]   16 bytes a lane: its unit of 4 rows; a warp's 512 adjacent
//   warp    a chunk of 32 rows: 8 loads, 128 look-ups a lane, and so 32 partial sums a lane, one for each row
//   sum     over lanes by a transposing butterfly: 31 shuffles turn 32 rows x 32 lanes into one row a lane
//   partial fp32 [tile][M][N], added up in order, with the bias, by reduce_splits
//
// Counts for a row of a tile, 1024 bits of codes: 4 PRMT, 4 LDS, 2 IADD3, 1 I2F, 2 FMUL, 1 HADD2 for the scale, 4 of
// the butterfly (1 SHFL), 1 of loads and addresses: 19.4 warp instructions in the SASS of sm_90 (kFloat 17.5,
// kPair14 29.6 for two tokens), and 5 wavefronts of shared memory. So a multiprocessor can take 205 bits a clock
// (kPair14 138), twice what the memory of an H100 brings, derived and not measured. Making a table of integers takes
// some 590 instructions a warp, 2300 clocks, as long as gathering 460 rows; in that time codes come to registers (64 KB
// a block) and to L2.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/psumbook.cuh"
#include "cuda/reduce.h"

namespace lutgemm::cuda {
namespace {

// All that registers for 32 rows of codes and scales allow.
constexpr int kWarps = kPsumWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunkLoads = kChunkRows / 4;
constexpr int kChunksToL2 = 2;  // of a warp, 128 KB a block: what memory brings in the time that a table takes
static_assert(kChunkRows * kTileUnits * kUnitColumns == 128 * kWarpSize, "a line of L2 for each lane");
constexpr int kTileRowBytes = kTileUnits * kUnitColumns;

LUTGEMM_ANYWHERE constexpr int scale_bytes(PsumWord word) { return word == PsumWord::kFloat ? 4 : 2; }

struct Gather {
  const unsigned char* codes;
  const unsigned char* scales;  // [groups][rows], fp32 for kFloat, else fp16
  int chunks;                   // of 32 rows
  int block_chunks, longer;     // of a block; the first `longer` blocks have one more
  float* partial;
};

// What a warp reads of a chunk. The next chunk's loads are issued as soon as this one's registers are free.
template <PsumWord kWord>
struct ChunkData {
  static constexpr int kScaleLoads = kChunkRows * scale_bytes(kWord) / 16;
  uint4 codes[kChunkLoads];
  uint4 scales[kScaleLoads];
};

__device__ __forceinline__ uint32_t part(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The scale of row `row` (a constant) of the chunk.
template <PsumWord kWord>
__device__ __forceinline__ float scale_of(const ChunkData<kWord>& data, int row) {
  if constexpr (kWord == PsumWord::kFloat) {
    return __uint_as_float(part(data.scales[row / 4], row % 4));
  } else {
    const uint32_t pair = part(data.scales[row / 8], row % 8 / 2);
    const uint32_t bits = row % 2 ? pair >> 16 : pair & 0xffffu;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

// The sum of a lane's 4 look-ups, for each token of the pass. lane_byte = 4 * lane.
template <PsumWord kWord>
__device__ __forceinline__ void look_up(const unsigned char* table, uint32_t codes, uint32_t lane_byte,
                                        const float (&units)[word_tokens(kWord)], float (&sums)[word_tokens(kWord)]) {
  uint32_t at[kUnitColumns];
#pragma unroll
  for (int column = 0; column < kUnitColumns; ++column) at[column] = prmt(codes, lane_byte, 0x5504 | column << 4);
  if constexpr (kWord == PsumWord::kInt16) {
    int sum = 0;
#pragma unroll
    for (int column = 0; column < kUnitColumns; ++column) {
      sum += *reinterpret_cast<const int16_t*>(table + column / 2 * 128 + column % 2 * 2 + at[column]);
    }
    sums[0] = static_cast<float>(sum) * units[0];
  } else if constexpr (kWord == PsumWord::kPair14) {
    int sum = 0;
#pragma unroll
    for (int column = 0; column < kUnitColumns; ++column) {
      sum += *reinterpret_cast<const int*>(table + column / 2 * kHalfTable + column % 2 * 128 + at[column]);
    }
    const int low = static_cast<int16_t>(sum);
    sums[0] = static_cast<float>(low) * units[0];
    sums[1] = static_cast<float>((sum - low) >> 16) * units[1];
  } else {
    float entry[kUnitColumns];
#pragma unroll
    for (int column = 0; column < kUnitColumns; ++column) {
      entry[column] = *reinterpret_cast<const float*>(table + column / 2 * kHalfTable + column % 2 * 128 + at[column]);
    }
    sums[0] = (entry[0] + entry[1]) + (entry[2] + entry[3]);
  }
}

// Of two values of every lane, lanes whose `bit` is clear take the first and the others the second, each added to the
// same value of the lane that differs in that bit.
__device__ __forceinline__ float merge(float first, float second, int lane, int bit) {
  const bool takes_second = (lane & bit) != 0;
  const float kept = takes_second ? second : first, given = takes_second ? first : second;
  return kept + __shfl_xor_sync(kFullMask, given, bit);
}

// One warp and its chunk: rows(first) leaves in lane l the sum over lanes of row first + l % kRows.
template <PsumWord kWord>
struct ChunkSum {
  static constexpr int kTokens = word_tokens(kWord);
  ChunkData<kWord>& data;
  const unsigned char* table;
  const float (&units)[kTokens];
  const unsigned char* next_codes;  // of this lane; null after the last chunk
  int lane;

  template <int kRows, int kFirst>
  __device__ __forceinline__ void rows(float (&sums)[kTokens]) {
    if constexpr (kRows == 1) {
      look_up<kWord>(table, part(data.codes[kFirst / 4], kFirst % 4), 4u * lane, units, sums);
      const float scale = scale_of<kWord>(data, kFirst);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sums[t] *= scale;
      if constexpr (kFirst % 4 == 3) {
        if (next_codes) data.codes[kFirst / 4] = load_stream16(next_codes + kFirst / 4 * (4 * kTileRowBytes));
      }
    } else {
      float second[kTokens];
      rows<kRows / 2, kFirst>(sums);
      rows<kRows / 2, kFirst + kRows / 2>(second);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sums[t] = merge(sums[t], second[t], lane, kRows / 2);
    }
  }
};

template <PsumWord kWord, int kVec>
__global__ void __launch_bounds__(kThreads, 1) codegemm_kernel(PsumShape s, Gather gather) {
  constexpr int kTokens = word_tokens(kWord);
  constexpr int kScaleLoads = ChunkData<kWord>::kScaleLoads;
  unsigned char* table = dynamic_shared();
  const int lane = threadIdx.x % kWarpSize;
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);  // one value a warp, as the compiler then knows
  const int tile = blockIdx.x, first_unit = tile * kTileUnits, m = blockIdx.z * kTokens;
  const int group =
      min(divide(first_unit + lane, s.units.units_per_group, s.units_per_group_inverse), s.units.groups - 1);
  const int row_block = static_cast<int>(blockIdx.y);
  const int first_chunk = row_block * gather.block_chunks + min(row_block, gather.longer);
  const int end_chunk = first_chunk + gather.block_chunks + (row_block < gather.longer ? 1 : 0);

  const unsigned char* codes =
      gather.codes + static_cast<int64_t>(tile) * gather.chunks * (kChunkRows * kTileRowBytes) + 16 * lane;
  const unsigned char* scales =
      gather.scales + static_cast<int64_t>(group) * gather.chunks * (kChunkRows * scale_bytes(kWord));

  // Weights first: they do not depend on the kernel before this one. Scales too, but where building needs the
  // registers.
  constexpr bool kScalesFirst = kVec < (kWord == PsumWord::kFloat ? 8 : 16);
  ChunkData<kWord> data;
  const auto load_scales = [&](int64_t of) {
#pragma unroll
    for (int i = 0; i < kScaleLoads; ++i) data.scales[i] = load16(scales + of * (kScaleLoads * 16) + i * 16);
  };
  int chunk = first_chunk + warp;
  if (chunk < end_chunk) {
#pragma unroll
    for (int i = 0; i < kChunkLoads; ++i) {
      data.codes[i] =
          load_stream16(codes + static_cast<int64_t>(chunk) * (kChunkRows * kTileRowBytes) + i * (4 * kTileRowBytes));
    }
    if constexpr (kScalesFirst) load_scales(chunk);
  }
  // While the table is made, memory goes on: the centroids, and the chunks after the first, come to L2.
  const int64_t book_bytes = static_cast<int64_t>(s.num_codebooks) * max(s.entries, 8) * kVec * scale_bytes(kWord);
  if (threadIdx.x * 128 < book_bytes && s.entries >= 8) {
    prefetch_l2(static_cast<const unsigned char*>(s.codebooks) + threadIdx.x * 128);
  }
#pragma unroll
  for (int ahead = 1; ahead <= kChunksToL2; ++ahead) {
    const int later = chunk + ahead * kWarps;
    if (later < end_chunk) {
      prefetch_l2(codes - 16 * lane + static_cast<int64_t>(later) * (kChunkRows * kTileRowBytes) + 128 * lane);
    }
  }
  grid_dependency_wait();
  float units[kTokens];
  make_psumbook<kWord, kVec>(s, first_unit, m, table, units);
  if constexpr (!kScalesFirst) {
    if (chunk < end_chunk) load_scales(chunk);
  }
  launch_dependents();

  for (; chunk < end_chunk; chunk += kWarps) {
    const bool more = chunk + kWarps < end_chunk;
    const int64_t next = chunk + kWarps;
    ChunkSum<kWord> sum{data, table, units, more ? codes + next * (kChunkRows * kTileRowBytes) : nullptr, lane};
    float sums[kTokens];
    sum.template rows<kChunkRows, 0>(sums);
    if (more) load_scales(next);
    const int n = chunk * kChunkRows + lane;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (n < s.N && m + t < s.M) gather.partial[(static_cast<int64_t>(tile) * s.M + m + t) * s.N + n] = sums[t];
    }
  }
}

// Above 8 codebook_bits a lane's own tables would not fit: here lanes are rows, and share the tables of one or more
// units.
constexpr int kWideThreads = 256;
constexpr int kWideEntries = 4096 * kUnitColumns;  // of a block: 64 KB, so that three blocks fit on an SM
constexpr int kWideMostVec = 16;
constexpr int kWideTileUnits = kWideEntries / 512 / kUnitColumns;  // the most, at 9 bits
constexpr int kWideShared = (kWideEntries + kWideTileUnits * kUnitColumns * kWideMostVec) * 4;

struct WideGather {
  const uint16_t* codes;
  const float* scales;  // [groups][rows]
  int chunks;
  int tile_units;
  float* partial;
};

__global__ void __launch_bounds__(kWideThreads) codegemm_wide_kernel(PsumShape s, WideGather gather) {
  float* table = reinterpret_cast<float*>(dynamic_shared());  // [column][entries]
  float* staged = table + kWideEntries;                       // [column][vec_len]
  const int tile = blockIdx.x, m = blockIdx.z, first_unit = tile * gather.tile_units;
  const int columns = min(gather.tile_units, s.units.units - first_unit) * kUnitColumns;
  grid_dependency_wait();
  for (int i = threadIdx.x; i < columns * s.vec_len; i += kWideThreads) {
    const int index = i / s.vec_len;
    const Column column = find_column(s, first_unit + index / kUnitColumns, index % kUnitColumns);
    const int k = column.k + i % s.vec_len;
    staged[i] = column.k >= 0 && k < s.K ? load_value(s.x, s.x_dtype, m * s.x_stride + k) : 0.f;
  }
  __syncthreads();
  for (int index = 0; index < columns; ++index) {
    const Column column = find_column(s, first_unit + index / kUnitColumns, index % kUnitColumns);
    for (int e = threadIdx.x; e < s.entries; e += kWideThreads) {
      const float* centroid =
          static_cast<const float*>(s.codebooks) + (static_cast<int64_t>(column.codebook) * s.entries + e) * s.vec_len;
      float sum = 0.f;
      for (int d = 0; d < s.vec_len; ++d) sum = fmaf(staged[index * s.vec_len + d], centroid[d], sum);
      table[index * s.entries + e] = sum;
    }
  }
  __syncthreads();
  launch_dependents();

  const int rows = gather.chunks * kChunkRows;
  const uint32_t mask = s.entries - 1;
  const int first_row = static_cast<int>(static_cast<int64_t>(blockIdx.y) * gather.chunks / gridDim.y) * kChunkRows;
  const int end_row = static_cast<int>(static_cast<int64_t>(blockIdx.y + 1) * gather.chunks / gridDim.y) * kChunkRows;
  for (int n = first_row + threadIdx.x; n < end_row; n += kWideThreads) {
    float y = 0.f;
#pragma unroll 2
    for (int u = 0; u * kUnitColumns < columns; ++u) {
      const int unit = first_unit + u, group = unit / s.units.units_per_group;
      const uint2 codes = load_stream8(gather.codes + (static_cast<int64_t>(unit) * rows + n) * kUnitColumns);
      const float* tables = table + u * kUnitColumns * s.entries;
      const float first = tables[codes.x & mask] + tables[s.entries + (codes.x >> 16 & mask)];
      const float second = tables[2 * s.entries + (codes.y & mask)] + tables[3 * s.entries + (codes.y >> 16 & mask)];
      y = fmaf(gather.scales[static_cast<int64_t>(group) * rows + n], first + second, y);
    }
    if (n < s.N) gather.partial[(static_cast<int64_t>(tile) * s.M + m) * s.N + n] = y;
  }
}

// Clocks of an SM. A chunk: its 160 wavefronts, or about as long for its 4 KB at the bandwidth that an SM has of an
// H100. A table, from the instructions of 16 warps at 4 a clock: integers by tensor cores, and fp32 by FFMA.
constexpr int64_t kChunkClocks = 165;
constexpr int64_t build_clocks(PsumWord word, int entries, int vec_len) {
  if (word == PsumWord::kFloat) return 300 + int64_t(entries) * (5 * vec_len / 2 + 5) / 2;
  return 2300 * word_tokens(word);
}

constexpr int kSlabTokens = 16;  // of a launch: bounds the workspace

template <PsumWord kWord, int kVec>
void launch_tiles(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu) {
  const int layers = static_cast<int>(ceil_div(s.M, plan.tokens));
  const LaunchShape shape{dim3(plan.tiles, plan.row_blocks, layers), dim3(kThreads),
                          static_cast<size_t>(plan.shared_bytes), gpu.stream, true};
  launch(codegemm_kernel<kWord, kVec>, shape, s, gather);
}

template <PsumWord kWord>
void launch_tiles(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu) {
  switch (s.vec_len) {
    case 2:
      return launch_tiles<kWord, 2>(s, gather, plan, gpu);
    case 4:
      return launch_tiles<kWord, 4>(s, gather, plan, gpu);
    case 8:
      return launch_tiles<kWord, 8>(s, gather, plan, gpu);
    default:
      return launch_tiles<kWord, 16>(s, gather, plan, gpu);
  }
}

}  // namespace

CodegemmPlan plan_codegemm(const CodegemmProblem& p, const Gpu& gpu) {
  const int sm_count = gpu.sm_count;
  const CodegemmUnits units = codegemm_units(p.io.K, p.group_size, p.num_codebooks, p.vec_len);
  const bool wide = p.codebook_bits > 8;
  CodegemmPlan plan{};
  plan.word = PsumWord::kInt16;
  if (p.float_scales) {
    plan.word = PsumWord::kFloat;
  } else if (p.io.M > 1 && p.accuracy <= Accuracy::kAccurate &&
             psumbook_bytes(PsumWord::kPair14, p.vec_len) <= gpu.shared_bytes) {
    plan.word = PsumWord::kPair14;
  }
  plan.tokens = word_tokens(plan.word);
  plan.tile_units = wide ? (4096 >> p.codebook_bits) : kTileUnits;
  plan.tiles = static_cast<int>(ceil_div(units.units, plan.tile_units));
  plan.shared_bytes = wide ? kWideShared : psumbook_bytes(plan.word, p.vec_len);
  plan.slab_tokens = static_cast<int>(std::min<int64_t>(p.io.M, kSlabTokens));

  // Blocks along N: as many as fill the device once, twice, .., whichever ends first.
  const int64_t chunks = ceil_div(p.io.N, kChunkRows), layers = ceil_div(plan.slab_tokens, plan.tokens);
  int64_t least = INT64_MAX;
  for (int waves = 1; waves <= 4; ++waves) {
    const int64_t fitting = int64_t(waves) * sm_count / (plan.tiles * layers);
    const int64_t row_blocks = std::clamp<int64_t>(fitting, 1, chunks);
    const int64_t rounds = ceil_div(plan.tiles * layers * row_blocks, sm_count);
    const int64_t clocks = rounds * (build_clocks(plan.word, 1 << p.codebook_bits, p.vec_len) +
                                     ceil_div(chunks, row_blocks) * kChunkClocks);
    if (clocks < least) {
      least = clocks;
      plan.row_blocks = static_cast<int>(row_blocks);
    }
  }
  return plan;
}

int64_t codegemm_workspace(const CodegemmProblem& p, const Gpu& gpu) {
  const CodegemmPlan plan = plan_codegemm(p, gpu);
  return int64_t(plan.tiles) * plan.slab_tokens * p.io.N * 4;
}

void codegemm(const CodegemmProblem& p, const Gpu& gpu) {
  const CodegemmPlan plan = plan_codegemm(p, gpu);
  if (plan.shared_bytes > gpu.shared_bytes) {
    throw std::runtime_error("codegemm needs " + std::to_string(plan.shared_bytes) +
                             " bytes of shared memory, and a block of this GPU gets " +
                             std::to_string(gpu.shared_bytes) +
                             "; use accuracy \"near-exact\", or algorithm \"dequantize\"");
  }
  const int element = p.io.dtype == DType::kFloat32 ? 4 : 2;
  const int chunks = static_cast<int>(ceil_div(p.io.N, kChunkRows));
  float* partial = static_cast<float*>(p.workspace);
  for (int64_t first = 0; first < p.io.M; first += plan.slab_tokens) {
    GpuIo io = p.io;
    io.M = std::min<int64_t>(plan.slab_tokens, p.io.M - first);
    io.x = static_cast<const unsigned char*>(p.io.x) + first * p.io.x_stride * element;
    io.y = static_cast<unsigned char*>(p.io.y) + first * p.io.N * element;
    PsumShape s{};
    s.units = codegemm_units(io.K, p.group_size, p.num_codebooks, p.vec_len);
    s.units_per_group_inverse = 1.f / static_cast<float>(s.units.units_per_group);
    s.num_codebooks_inverse = 1.f / static_cast<float>(p.num_codebooks);
    s.M = static_cast<int>(io.M), s.N = static_cast<int>(io.N), s.K = static_cast<int>(io.K);
    s.group_size = static_cast<int>(p.group_size);
    s.num_codebooks = p.num_codebooks, s.entries = 1 << p.codebook_bits, s.vec_len = p.vec_len;
    s.x = io.x, s.x_stride = io.x_stride, s.x_dtype = io.dtype;
    s.codebooks = p.codebooks, s.norms = p.norms;
    if (p.codebook_bits > 8) {
      const WideGather gather{static_cast<const uint16_t*>(p.codes), static_cast<const float*>(p.scales), chunks,
                              plan.tile_units, partial};
      const LaunchShape shape{dim3(plan.tiles, plan.row_blocks, s.M), dim3(kWideThreads),
                              static_cast<size_t>(plan.shared_bytes), gpu.stream, true};
      launch(codegemm_wide_kernel, shape, s, gather);
    } else {
      const Gather gather{static_cast<const unsigned char*>(p.codes),
                          static_cast<const unsigned char*>(p.scales),
                          chunks,
                          chunks / plan.row_blocks,
                          chunks % plan.row_blocks,
                          partial};
      switch (plan.word) {
        case PsumWord::kFloat:
          launch_tiles<PsumWord::kFloat>(s, gather, plan, gpu);
          break;
        case PsumWord::kInt16:
          launch_tiles<PsumWord::kInt16>(s, gather, plan, gpu);
          break;
        case PsumWord::kPair14:
          launch_tiles<PsumWord::kPair14>(s, gather, plan, gpu);
          break;
      }
    }
    reduce_splits(io, partial, plan.tiles, gpu);
  }
}

}  // namespace lutgemm::cuda
