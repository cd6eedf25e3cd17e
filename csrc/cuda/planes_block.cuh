// How a kernel runs over the units of a weight that bit_planes.cuh draws; what it does with a unit is its Form.
//
// A block owns a tile of rows and all chunks of its split; its warps share the chunks, each streaming its units through
// a ring in shared memory by cp.async, and their sums are added in the order of the warps. Blocks go on to further
// tiles with the activations that they have prepared.
//
// Shared memory of a block:
//
//   ring       [warp][stage]       units as they come
//   chunks     [chunk]             the split's activations: B fragments, then floats that go with them: steps, sums
//   outputs    [2 buffers][warp]   the sums of a tile
//
// A Form has
//
//   kTiles, kValues     accumulators of a lane: kValues floats for each of kTiles n tiles of an mma
//   prepare(...)        a chunk of one token by each half of a warp; v are columns 8h .. 8h + 7 of lane h of the half
//   Lane                where a lane finds its part of a chunk
//   add(...)            one unit and its chunk of activations
//   put(...), sum(...)  accumulators to outputs; the sum over the warps there for one row and token
#pragma once

#include "cuda/epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/planes.cuh"
#include "cuda/planes_plan.h"
#include "cuda/ptx.cuh"

namespace lutgemm::cuda {
namespace {

// x[m, k .. k + 7] as it is stored, zeros past K; 16-bit types fill the first half. Apart from `as_eight`, so that
// several loads are under way together: each waits for L2, some 250 clocks.
struct EightOfX {
  uint4 low, high;
};

__device__ __forceinline__ EightOfX load_eight(const GpuIo& io, int64_t m, int64_t k) {
  EightOfX bits{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (k >= io.K) return bits;
  const int64_t at = m * io.x_stride + k;
  const bool wide = io.dtype == DType::kFloat32;
  if (k + 8 <= io.K && io.x_stride % 8 == 0) {
    const void* from = static_cast<const unsigned char*>(io.x) + (wide ? 4 : 2) * at;
    bits.low = load16(from);
    if (wide) bits.high = load16(static_cast<const float*>(from) + 4);
    return bits;
  }
  uint32_t v[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (k + i < io.K) {
      v[i] = wide ? static_cast<const uint32_t*>(io.x)[at + i] : static_cast<const uint16_t*>(io.x)[at + i];
    }
  }
  if (wide) return {make_uint4(v[0], v[1], v[2], v[3]), make_uint4(v[4], v[5], v[6], v[7])};
  bits.low = make_uint4(v[0] | v[1] << 16, v[2] | v[3] << 16, v[4] | v[5] << 16, v[6] | v[7] << 16);
  return bits;
}

__device__ __forceinline__ void as_eight(DType dtype, const EightOfX& bits, float (&v)[8]) {
  const uint32_t words[8] = {bits.low.x,  bits.low.y,  bits.low.z,  bits.low.w,
                             bits.high.x, bits.high.y, bits.high.z, bits.high.w};
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(words[i]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t half = (words[i / 2] >> (16 * (i % 2))) & 0xffffu;
      v[i] = __half2float(__ushort_as_half(static_cast<unsigned short>(half)));
    }
  }
}

// `words` words by a warp; `to` and `from` are this lane's first 16 bytes.
__device__ __forceinline__ void copy_words(unsigned char* to, const uint32_t* from, int words, int lane) {
  constexpr int kAtOnce = 4, kPassWords = 4 * kWarpSize;
#pragma unroll 1
  for (int left = words - 4 * lane; left > -4 * lane; left -= kAtOnce * kPassWords) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (left > i * kPassWords) cp_async16_stream(to + i * kPassWords * 4, from + i * kPassWords);
    }
    to += kAtOnce * kPassWords * 4, from += kAtOnce * kPassWords;
  }
}

// A warp's chunks of a block's tokens: pairs of them, one for each half of the warp; the last may be alone.
template <typename Form>
__device__ __forceinline__ void prepare_own(const PlanesArguments& arguments, int64_t first_token, int tokens,
                                            int64_t first_chunk, int count, int lane, uint32_t* chunks) {
  const GpuIo& io = arguments.problem.io;
  const int items = (count + 1) / 2 * tokens, half = lane / 16;
  int load_token = 0, load_chunk = half, token = 0, chunk = half;
  for (int first = 0; first < items; first += kLoadsOfX) {
    EightOfX bits[kLoadsOfX];
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      const bool there = first + i < items && load_chunk < count;
      const int64_t k = (first_chunk + load_chunk) * kPlanesChunk + 8 * (lane % 16);
      bits[i] = load_eight(io, first_token + load_token, there ? k : io.K);
      if (++load_token == tokens) load_token = 0, load_chunk += 2;
    }
#pragma unroll
    for (int i = 0; i < kLoadsOfX; ++i) {
      if (first + i >= items) break;
      float v[8];
      as_eight(io.dtype, bits[i], v);
      Form::prepare(arguments.plan, v, lane, chunk < count, token, tokens,
                    chunks + static_cast<int64_t>(chunk) * arguments.chunk_words);
      if (++token == tokens) token = 0, chunk += 2;
    }
  }
}

constexpr int kPrepareWarps = 4;

// Two chunks of a token by each warp: a grid of [M] x [pairs of chunks / kPrepareWarps].
template <typename Form>
__device__ __forceinline__ void prepare_block(const PlanesArguments& arguments) {
  const BitPlanesProblem& p = arguments.problem;
  const int lane = threadIdx.x % kWarpSize, tokens_of_block = arguments.plan.tokens;
  const int64_t chunk = (static_cast<int64_t>(blockIdx.y) * kPrepareWarps + threadIdx.x / kWarpSize) * 2 + lane / 16;
  const int64_t m = blockIdx.x, token_block = m / tokens_of_block, first_token = token_block * tokens_of_block;
  const int tokens = static_cast<int>(p.io.M - first_token < tokens_of_block ? p.io.M - first_token : tokens_of_block);
  const bool there = chunk < p.chunks;
  // Before the wait: the kernel that follows copies codes meanwhile, and waits until this one has ended, so for x too.
  launch_dependents();
  grid_dependency_wait();
  float v[8];
  as_eight(p.io.dtype, load_eight(p.io, m, there ? chunk * kPlanesChunk + 8 * (lane % 16) : p.io.K), v);
  Form::prepare(arguments.plan, v, lane, there, static_cast<int>(m - first_token), tokens,
                arguments.prepared + (token_block * p.chunks + chunk) * arguments.chunk_words);
}

inline LaunchShape prepare_shape(const PlanesArguments& arguments, void* stream) {
  return {dim3(unsigned(arguments.problem.io.M), unsigned(ceil_div(arguments.problem.chunks, 2 * kPrepareWarps))),
          dim3(unsigned(kPrepareWarps * kWarpSize)), 0, stream, true};
}

template <typename Form>
__device__ __forceinline__ void planes_block(const PlanesArguments& arguments) {
  const BitPlanesProblem& p = arguments.problem;
  const BitPlanesPlan& plan = arguments.plan;
  const int warps = plan.warps, batch = plan.units_per_stage, stage_bytes = arguments.stage_bytes;
  // Shuffles keep values in registers which the compiler would else work out from threadIdx anew in every loop.
  const int warp = threadIdx.x / kWarpSize, own_lane = threadIdx.x % kWarpSize;
  const int lane = __shfl_sync(kFullMask, own_lane, own_lane);

  const int64_t first_chunk = blockIdx.y * plan.split_chunks;
  const int chunks =
      static_cast<int>(first_chunk + plan.split_chunks < p.chunks ? plan.split_chunks : p.chunks - first_chunk);
  const int own_begin = __shfl_sync(kFullMask, warp * chunks >> arguments.warp_bits, 0);
  const int own_count = __shfl_sync(kFullMask, ((warp + 1) * chunks >> arguments.warp_bits), 0) - own_begin;
  const int64_t first_token = static_cast<int64_t>(blockIdx.z) * plan.tokens;
  const int tokens = static_cast<int>(p.io.M - first_token < plan.tokens ? p.io.M - first_token : plan.tokens);

  const PlanesShared& sizes = arguments.sizes;
  unsigned char* shared = dynamic_shared();
  unsigned char* ring = shared + warp * kPlanesStages * stage_bytes;
  auto* x_chunks = reinterpret_cast<uint32_t*>(shared + sizes.ring);
  auto* outputs = reinterpret_cast<float*>(shared + sizes.ring + sizes.chunks);

  // The warp's units of all its tiles, in batches: `left` units of the tile and `left_tiles` tiles are not copied yet.
  const int unit_words = arguments.unit_words;
  int left = own_count;
  int left_tiles = own_count > 0 ? static_cast<int>(ceil_div(p.tiles - blockIdx.x, gridDim.x)) : 0;
  const uint32_t* from = p.packed + (blockIdx.x * p.chunks + first_chunk + own_begin) * unit_words + 4 * lane;
  const int64_t to_next_tile = (gridDim.x * p.chunks - own_count) * unit_words;
  unsigned char* to = ring + 16 * lane;
  unsigned char* const ring_end = to + kPlanesStages * stage_bytes;
  const auto copy_batch = [&] {
    if (left_tiles > 0) {
      const int units = left < batch ? left : batch, words = units * unit_words;
      copy_words(to, from, words, lane);
      left -= units;
      from += words;
      if (left == 0) left = own_count, from += to_next_tile, --left_tiles;
      to += stage_bytes;
      if (to == ring_end) to = ring + 16 * lane;
    }
    cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kPlanesStages - 1; ++i) copy_batch();

  grid_dependency_wait();
  launch_dependents();
  uint32_t* own_chunks = x_chunks + static_cast<int64_t>(own_begin) * arguments.chunk_words;
  if (arguments.prepared != nullptr) {
    const uint32_t* from =
        arguments.prepared + (blockIdx.z * p.chunks + first_chunk + own_begin) * arguments.chunk_words;
    copy_words(reinterpret_cast<unsigned char*>(own_chunks + 4 * lane), from + 4 * lane,
               own_count * arguments.chunk_words, lane);
    cp_async_commit();
    cp_async_wait<0>();
  } else {
    prepare_own<Form>(arguments, first_token, tokens, first_chunk + own_begin, own_count, lane, own_chunks);
  }
  __syncwarp();

  const typename Form::Lane own(p, plan, lane, tokens);
  const unsigned char* stage = ring;
  const unsigned char* const stages_end = ring + kPlanesStages * stage_bytes;
  int buffer = 0;
  for (int64_t tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
    float acc[Form::kTiles][Form::kValues] = {};
    const uint32_t* chunk = own_chunks;
    for (int done = 0; done < own_count; done += batch) {
      cp_async_wait<kPlanesStages - 2>();
      __syncwarp();  // every lane's part of this batch is there, and the one before it has been read
      copy_batch();
      const auto* unit = reinterpret_cast<const uint32_t*>(stage);
      stage += stage_bytes;
      if (stage == stages_end) stage = ring;
      for (int u = min(batch, own_count - done); u > 0; --u) {
        Form::add(p, own, chunk, unit, acc);
        unit += unit_words, chunk += arguments.chunk_words;
      }
    }

    // Two buffers: the next tile's sums are written while slow threads still read this one's; one barrier a tile.
    constexpr int kWarpFloats = Form::kTiles * Form::kValues * kWarpSize;
    float* out = outputs + buffer * (sizes.outputs / 8);
    buffer ^= 1;
    Form::put(out + warp * kWarpFloats, lane, acc);
    __syncthreads();
    for (int o = threadIdx.x; o < kPlanesTileRows * tokens; o += blockDim.x) {
      const int row = o % kPlanesTileRows, m = o / kPlanesTileRows;
      const float sum = Form::sum(out, warps, plan.terms, row, m);
      const int64_t n = tile * kPlanesTileRows + row;
      if (n >= p.io.N) continue;
      if (arguments.partial != nullptr) {
        arguments.partial[(blockIdx.y * p.io.M + first_token + m) * p.io.N + n] = sum;
      } else {
        store_result(p.io.y, p.io.bias, p.io.dtype, p.io.N, first_token + m, n, sum);
      }
    }
  }
}

}  // namespace
}  // namespace lutgemm::cuda
