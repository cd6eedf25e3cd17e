// Kernels that apply the primitives of ptx_hopper.cuh to data: their values against what numpy computes.
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "driver.h"

namespace lutgemm {
namespace {

constexpr int kDepth = 32;  // K of `product`
constexpr int kStages = 3, kTokens = 32;

__device__ __forceinline__ unsigned thread() { return threadIdx.x; }

// The fragment of rows 16 * warp .. + 15, columns k .. k + 15 of A [64, stride]
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const void* matrix, unsigned k, unsigned stride) {
  const unsigned warp = thread() / 32 % 4, group = thread() % 32 / 4, t = thread() % 4;
  const auto* values = static_cast<const unsigned short*>(matrix);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned at = (16 * warp + group + i % 2 * 8) * stride + k + 2 * t + i / 2 * 8;
    a[i] = values[at] | static_cast<uint32_t>(values[at + 1]) << 16;
  }
}

template <int kColumns>
__device__ __forceinline__ void store_d(const float (&d)[kColumns / 2], void* y) {
  const unsigned warp = thread() / 32 % 4, group = thread() % 32 / 4, t = thread() % 4;
  for (unsigned i = 0; i < kColumns / 2; ++i) {
    const unsigned row = 16 * warp + group + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
    static_cast<float*>(y)[row * kColumns + column] = d[i];
  }
}

// y [64, kColumns] = 1 + A [64, 32] B [kColumns, 32]^T; n: 0 core matrices along K together, 1 those along tokens, 2
// with gaps; + 4: bfloat16. 128 threads a warpgroup, of which each computes the same.
template <int kColumns>
__global__ void product(const void* a, const void* b, void* y, int n) {
  unsigned char* shared = dynamic_shared();
  const unsigned tiles = kColumns / 8, halves = kDepth / 8;
  const unsigned leading = n % 4 == 0 ? 128 : n % 4 == 1 ? 128 * tiles : 128 * tiles + 256;
  const unsigned stride = n % 4 == 0 ? 128 * halves : 128;
  for (unsigned i = thread(); i < kColumns * halves; i += blockDim.x) {
    const unsigned token = i / halves, half = i % halves;
    store16(shared + half * leading + token / 8 * stride + token % 8 * 16, load16(static_cast<const uint4*>(b) + i));
  }
  fence_async_proxy();
  __syncthreads();
  float d[kColumns / 2];
  for (float& value : d) value = 1.0f;
  uint32_t fragments[2][4];
  load_a(fragments[0], a, 0, kDepth);
  load_a(fragments[1], a, 16, kDepth);
  const uint64_t descriptor = wgmma_descriptor(shared, leading, stride);
  hold_registers(d);
  wgmma_fence();
  if (n < 4) {
    wgmma_f16<kColumns>(d, fragments[0], descriptor);
    wgmma_f16<kColumns>(d, fragments[1], descriptor + 2 * leading / 16);
  } else {
    wgmma_bf16<kColumns>(d, fragments[0], descriptor);
    wgmma_bf16<kColumns>(d, fragments[1], descriptor + 2 * leading / 16);
  }
  wgmma_commit();
  wgmma_wait<0>();
  hold_registers(d);
  store_d<kColumns>(d, static_cast<float*>(y) + thread() / 128 * 64 * kColumns);
}

// y [64, 32] = A [64, 16 n] B [16 n, 32]. B lies in steps of K as core matrices [n][2][4][8][8], and goes through a
// ring of stages that the last warp fills. 4 warps of products and that one. Groups of products overlap.
__global__ void pipeline(const void* a, const void* b, void* y, int n) {
  LUTGEMM_SHARED(uint64_t, full, [kStages]);
  LUTGEMM_SHARED(uint64_t, empty, [kStages]);
  constexpr unsigned kBytes = 16 * kTokens * 2;
  unsigned char* stages = dynamic_shared();
  if (thread() == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&full[s], 1);
      mbarrier_init(&empty[s], 4);
    }
    mbarrier_init_fence();
  }
  __syncthreads();
  if (thread() >= 128) {
    if (thread() % 32 == 0) {
      for (int k = 0; k < n; ++k) {
        const int s = k % kStages;
        const unsigned char* source = static_cast<const unsigned char*>(b) + k * kBytes;
        mbarrier_wait(&empty[s], k / kStages % 2 ^ 1);
        mbarrier_arrive_expect(&full[s], kBytes);
        bulk_copy(stages + s * kBytes, source, kBytes / 2, &full[s]);
        bulk_copy_stream(stages + s * kBytes + kBytes / 2, source + kBytes / 2, kBytes / 2, &full[s]);
      }
    }
    return;
  }
  float d[kTokens / 2] = {};
  uint32_t fragment[4];
  hold_registers(d);
  for (int k = 0; k < n; ++k) {
    const int s = k % kStages;
    load_a(fragment, a, 16 * k, 16 * n);
    mbarrier_wait(&full[s], k / kStages % 2);
    wgmma_fence();
    wgmma_f16<kTokens>(d, fragment, wgmma_descriptor(stages + s * kBytes, kBytes / 2, 128));
    wgmma_commit();
    wgmma_wait<1>();
    if (k > 0 && thread() % 32 == 0) mbarrier_arrive(&empty[(k - 1) % kStages]);
  }
  wgmma_wait<0>();
  hold_registers(d);
  store_d<kTokens>(d, y);
}

// y[phase][thread] = a[thread] summed over phase + 1 neighbours: barriers in shared memory in place of __syncthreads,
// with two buffers of values.
__global__ void neighbours(const void* a, const void*, void* y, int n) {
  LUTGEMM_SHARED(uint64_t, barrier, );
  LUTGEMM_SHARED(int, values, [2][256]);
  if (thread() == 0) {
    mbarrier_init(&barrier, blockDim.x);
    mbarrier_init_fence();
  }
  const int own = static_cast<const int*>(a)[thread()];
  int sum = 0;
  __syncthreads();
  for (int phase = 0; phase < n; ++phase) {
    values[phase % 2][thread()] = sum;
    mbarrier_arrive(&barrier);
    mbarrier_wait(&barrier, phase % 2);
    sum = own + values[phase % 2][(thread() + 1) % blockDim.x];
    static_cast<int*>(y)[phase * static_cast<int>(blockDim.x) + static_cast<int>(thread())] = sum;
  }
}

}  // namespace
}  // namespace lutgemm

using namespace lutgemm;
LUTGEMM_TEST_KERNELS(run_hopper, {"product_8", product<8>}, {"product_16", product<16>}, {"product_32", product<32>},
                     {"product_64", product<64>}, {"product_96", product<96>}, {"product_128", product<128>},
                     {"product_192", product<192>}, {"product_256", product<256>}, {"pipeline", pipeline},
                     {"neighbours", neighbours})
