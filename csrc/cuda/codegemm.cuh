// The kernel of codegemm.cu and codegemm_float.cu: rows looked up in the Psumbook of a tile, and summed over lanes.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/psumbook.cuh"

namespace lutgemm::cuda {

struct Gather {  // of a launch
  const unsigned char* codes;
  const unsigned char* scales;  // [groups][rows], fp32 for fp32 entries, else fp16
  int chunks;                   // of 32 rows
  BlockPlan rows;               // chunks of a block
  float* partial;
};

namespace gather_parts {

// All that registers for 32 rows of codes and scales allow.
constexpr int kWarps = kPsumWarps;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kChunkLoads = kChunkRows / 4;
constexpr int kChunksToL2 = 2;  // of a warp, 128 KB a block: what memory brings in the time that a table takes
static_assert(kChunkRows * kTileUnits * kUnitColumns == 128 * kWarpSize, "a line of L2 for each lane");
constexpr int kTileRowBytes = kTileUnits * kUnitColumns;

LUTGEMM_ANYWHERE constexpr int scale_bytes(PsumWord word) { return is_float(word) ? 4 : 2; }

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
  if constexpr (is_float(kWord)) {
    return __uint_as_float(part(data.scales[row / 4], row % 4));
  } else {
    const uint32_t pair = part(data.scales[row / 8], row % 8 / 2);
    const uint32_t bits = row % 2 ? pair >> 16 : pair & 0xffffu;
    return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  }
}

// The sum of a lane's look-ups, for each token of the pass. selector: of prmt, for the first of the block's columns.
template <PsumWord kWord>
__device__ __forceinline__ void look_up(const unsigned char* table, uint32_t codes, uint32_t lane_byte,
                                        uint32_t selector, const float (&units)[word_tokens(kWord)],
                                        float (&sums)[word_tokens(kWord)]) {
  constexpr int kColumns = kWord == PsumWord::kHalfFloat ? kUnitColumns / 2 : kUnitColumns;
  uint32_t at[kColumns];
#pragma unroll
  for (int column = 0; column < kColumns; ++column) at[column] = prmt(codes, lane_byte, selector + 0x10u * column);
  if constexpr (kWord == PsumWord::kInt16) {
    int sum = 0;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      sum += *reinterpret_cast<const int16_t*>(table + column / 2 * 128 + column % 2 * 2 + at[column]);
    }
    sums[0] = static_cast<float>(sum) * units[0];
  } else if constexpr (kWord == PsumWord::kPair14) {
    int sum = 0;
#pragma unroll
    for (int column = 0; column < kColumns; ++column) {
      sum += *reinterpret_cast<const int*>(table + column / 2 * kHalfTable + column % 2 * 128 + at[column]);
    }
    const int low = static_cast<int16_t>(sum);
    sums[0] = static_cast<float>(low) * units[0];
    sums[1] = static_cast<float>((sum - low) >> 16) * units[1];
  } else {
    float pairs[kColumns / 2];
#pragma unroll
    for (int pair = 0; pair < kColumns / 2; ++pair) {
      const unsigned char* half = table + pair * kHalfTable;
      pairs[pair] = *reinterpret_cast<const float*>(half + at[2 * pair]) +
                    *reinterpret_cast<const float*>(half + 128 + at[2 * pair + 1]);
    }
    sums[0] = kColumns == 4 ? pairs[0] + pairs[kColumns / 2 - 1] : pairs[0];
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
  uint32_t selector;

  template <int kRows, int kFirst>
  __device__ __forceinline__ void rows(float (&sums)[kTokens]) {
    if constexpr (kRows == 1) {
      look_up<kWord>(table, part(data.codes[kFirst / 4], kFirst % 4), 4u * lane, selector, units, sums);
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
  constexpr int kHalves = kWord == PsumWord::kHalfFloat ? 2 : 1;
  const int split = blockIdx.x, tile = split / kHalves, half = split % kHalves;
  const int first_unit = tile * kTileUnits, m = blockIdx.z * kTokens;
  const int group =
      min(divide(first_unit + lane, s.units.units_per_group, s.units_per_group_inverse), s.units.groups - 1);
  const OwnBlocks own = own_blocks(gather.rows, blockIdx.y);
  const int first_chunk = own.first_unit(), end_chunk = own.end_unit();
  choose_codebooks(s, own.sibling);

  const unsigned char* codes =
      gather.codes + static_cast<int64_t>(tile) * gather.chunks * (kChunkRows * kTileRowBytes) + 16 * lane;
  const unsigned char* scales =
      gather.scales + static_cast<int64_t>(group) * gather.chunks * (kChunkRows * scale_bytes(kWord));

  // Weights first: they do not depend on the kernel before this one. Scales too, but where building needs the
  // registers.
  constexpr bool kScalesFirst = kVec < (is_float(kWord) ? 8 : 16);
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
  if (threadIdx.x * 128 < s.book_bytes) {
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
  make_psumbook<kWord, kVec>(s, first_unit, half, m, table, units);
  if constexpr (!kScalesFirst) {
    if (chunk < end_chunk) load_scales(chunk);
  }
  launch_dependents();

  for (; chunk < end_chunk; chunk += kWarps) {
    const bool more = chunk + kWarps < end_chunk;
    const int64_t next = chunk + kWarps;
    ChunkSum<kWord> sum{
        data, table, units, more ? codes + next * (kChunkRows * kTileRowBytes) : nullptr, lane, 0x5504u + 0x20u * half};
    float sums[kTokens];
    sum.template rows<kChunkRows, 0>(sums);
    if (more) load_scales(next);
    const int n = chunk * kChunkRows + lane;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (n < s.N && m + t < s.M) gather.partial[(static_cast<int64_t>(split) * s.M + m + t) * s.N + n] = sums[t];
    }
  }
}

template <PsumWord kWord, int kVec>
void launch_tiles(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu) {
  const int layers = static_cast<int>(ceil_div(s.M, plan.tokens));
  const LaunchShape shape{dim3(plan.splits, plan.row_blocks, layers), dim3(kThreads),
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

}  // namespace gather_parts

}  // namespace lutgemm::cuda
