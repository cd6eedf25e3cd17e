// codegemm with fp32 entries: what is to be exact, fp32 weights, 3 codebooks; and codes of more than 8 bits.
#include "cuda/codegemm.cuh"
#include "cuda/epilogue.cuh"

namespace lutgemm::cuda {
namespace {

// Above 8 codebook_bits a lane's own tables would not fit: here lanes are rows, and share the tables of one or more
// units.
constexpr int kWideThreads = 256;
constexpr int kWideEntries = 4096 * kUnitColumns;  // of a block: 64 KB, so that three blocks fit on an SM
__global__ void __launch_bounds__(kWideThreads) codegemm_wide_kernel(PsumShape s, Gather gather, int tile_units) {
  float* table = reinterpret_cast<float*>(dynamic_shared());  // [column][entries]
  float* staged = table + kWideEntries;                       // [column][vec_len]
  const int tile = blockIdx.x, m = blockIdx.z, first_unit = tile * tile_units;
  const int columns = min(tile_units, s.units.units - first_unit) * kUnitColumns;
  const OwnBlocks own = own_blocks(gather.rows, blockIdx.y);
  choose_codebooks(s, own.sibling);
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

  const auto* all_codes = reinterpret_cast<const uint16_t*>(gather.codes);  // [units][rows][4 columns]
  const auto* scales = reinterpret_cast<const float*>(gather.scales);       // [groups][rows]
  const int rows = gather.chunks * kChunkRows;
  const uint32_t mask = s.entries - 1;
  const int first_row = own.first_unit() * kChunkRows, end_row = own.end_unit() * kChunkRows;
  for (int n = first_row + threadIdx.x; n < end_row; n += kWideThreads) {
    float y = 0.f;
#pragma unroll 2
    for (int u = 0; u * kUnitColumns < columns; ++u) {
      const int unit = first_unit + u, group = unit / s.units.units_per_group;
      const uint2 codes = load_stream8(all_codes + (static_cast<int64_t>(unit) * rows + n) * kUnitColumns);
      const float* tables = table + u * kUnitColumns * s.entries;
      const float first = tables[codes.x & mask] + tables[s.entries + (codes.x >> 16 & mask)];
      const float second = tables[2 * s.entries + (codes.y & mask)] + tables[3 * s.entries + (codes.y >> 16 & mask)];
      y = fmaf(scales[static_cast<int64_t>(group) * rows + n], first + second, y);
    }
    if (n < s.N) gather.partial[(static_cast<int64_t>(tile) * s.M + m) * s.N + n] = y;
  }
}

}  // namespace

void launch_float_tiles(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu) {
  if (plan.word == PsumWord::kFloat) {
    gather_parts::launch_tiles<PsumWord::kFloat>(s, gather, plan, gpu);
  } else {
    gather_parts::launch_tiles<PsumWord::kHalfFloat>(s, gather, plan, gpu);
  }
}

void launch_wide(const PsumShape& s, const Gather& gather, const CodegemmPlan& plan, const Gpu& gpu) {
  const LaunchShape shape{dim3(plan.tiles, plan.row_blocks, s.M), dim3(kWideThreads),
                          static_cast<size_t>(plan.shared_bytes), gpu.stream, true};
  launch(codegemm_wide_kernel, shape, s, gather, plan.tile_units);
}

}  // namespace lutgemm::cuda
