// Kernels that apply one primitive to data: its values against what numpy and torch compute. n chooses a variant.
#include "cuda/device.cuh"
#include "cuda/ptx.cuh"
#include "driver.h"

namespace lutgemm {
namespace {

__device__ __forceinline__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// y[i] = float bits of half a[i] and of bfloat16 a[i]; 16-bit inputs
__global__ void widen(const void* a, const void*, void* y, int) {
  const int i = global_thread();
  const unsigned short bits = static_cast<const unsigned short*>(a)[i];
  float* out = static_cast<float*>(y) + 2 * i;
  out[0] = __half2float(__ushort_as_half(bits));
  out[1] = __bfloat162float(__ushort_as_bfloat16(bits));
}

// y[i] = half bits, bfloat16 bits of float a[i]
__global__ void narrow(const void* a, const void*, void* y, int) {
  const int i = global_thread();
  const float value = static_cast<const float*>(a)[i];
  unsigned short* out = static_cast<unsigned short*>(y) + 2 * i;
  out[0] = __half_as_ushort(__float2half_rn(value));
  out[1] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

// a: triples of pairs; y: five results of each, as pairs
template <typename Pair>
__global__ void arithmetic(const void* a, const void*, void* y, int) {
  const int i = global_thread();
  const Pair* in = static_cast<const Pair*>(a) + 3 * i;
  const Pair p = in[0], q = in[1], r = in[2];
  Pair* out = static_cast<Pair*>(y) + 5 * i;
  out[0] = __hadd2(p, q);
  out[1] = __hsub2(p, q);
  out[2] = __hmul2(p, q);
  out[3] = __hfma2(p, q, r);
  out[4] = __hmax2(p, q);
}

// a, b: words; y: 16 words of each pair
__global__ void integers(const void* a, const void* b, void* y, int) {
  const int i = global_thread();
  const uint32_t u = static_cast<const uint32_t*>(a)[i], v = static_cast<const uint32_t*>(b)[i];
  uint32_t* out = static_cast<uint32_t*>(y) + 24 * i;
  out[0] = static_cast<uint32_t>(__popc(u));
  out[1] = static_cast<uint32_t>(__clz(static_cast<int>(u)));
  out[2] = static_cast<uint32_t>(__ffs(static_cast<int>(u)));
  out[3] = __brev(u);
  out[4] = __byte_perm(u, v, u >> 7);
  out[5] = prmt(u, v, v >> 5);
  out[6] = __funnelshift_l(u, v, u & 63u);
  out[7] = __funnelshift_r(u, v, u & 63u);
  out[8] = static_cast<uint32_t>(__dp4a(static_cast<int>(u), static_cast<int>(v), 5));
  out[9] = __dp4a(u, v, 5u);
  out[10] = __vadd4(u, v);
  out[11] = __vsub4(u, v);
  out[12] = __vadd2(u, v);
  out[13] = __vsub2(u, v);
  out[14] = __umulhi(u, v);
  out[15] = static_cast<uint32_t>(__mulhi(static_cast<int>(u), static_cast<int>(v)));
  out[16] = lop3<0xE8>(u, v, u >> 3);
  out[17] = lop3<0x96>(u, v, u >> 3);
  out[18] = lop3<0xEA>(u, v, u >> 3);
  out[19] = lop3<0x1D>(u, v, u >> 3);
  out[20] = static_cast<uint32_t>(__float2int_rn(__uint_as_float(u)));
  out[21] = static_cast<uint32_t>(__float2int_rz(__uint_as_float(u)));
  out[22] = __float2uint_rn(__uint_as_float(u));
  out[23] = __float_as_uint(__fmaf_rn(__uint_as_float(u), __uint_as_float(v), 1.0f));
}

// y[variant][thread] for a[thread]; n: the operand of each shuffle
__global__ void shuffles(const void* a, const void*, void* y, int n) {
  const int i = static_cast<int>(threadIdx.x), size = static_cast<int>(blockDim.x);
  const int value = static_cast<const int*>(a)[i];
  int* out = static_cast<int*>(y) + i;
  out[0 * size] = __shfl_sync(kFullMask, value, (i * 7 + n) % 32);
  out[1 * size] = __shfl_sync(kFullMask, value, n, 8);
  out[2 * size] = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(n));
  out[3 * size] = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(n), 16);
  out[4 * size] = __shfl_down_sync(kFullMask, value, static_cast<unsigned>(n));
  out[5 * size] = __shfl_down_sync(kFullMask, value, static_cast<unsigned>(n), 4);
  out[6 * size] = __shfl_xor_sync(kFullMask, value, n);
  out[7 * size] = __shfl_xor_sync(kFullMask, value, n, 8);
  out[8 * size] = static_cast<int>(__shfl_xor_sync(kFullMask, 3.5 * value, n) * 2);
  out[9 * size] = __half2int_rn(__shfl_xor_sync(kFullMask, __int2half_rn(value % 1000), n));
  out[10 * size] = static_cast<int>(__ballot_sync(kFullMask, value & 1));
  out[11 * size] = __any_sync(kFullMask, value % 64 == 5);
  out[12 * size] = __all_sync(kFullMask, value != 5);
  out[13 * size] = static_cast<int>(__match_any_sync(kFullMask, static_cast<unsigned>(value % 4)));
  out[14 * size] = __reduce_add_sync(kFullMask, value);
  out[15 * size] = __reduce_max_sync(kFullMask, value);
  out[16 * size] = static_cast<int>(__reduce_min_sync(kFullMask, static_cast<unsigned>(value)));
  out[17 * size] = i % 32 < 16 ? __shfl_xor_sync(0xffffu, value, 3) : -value;
  out[18 * size] = __syncthreads_count(value & 1);
  out[19 * size] = __syncthreads_or(value % 64 == 5);
  out[20 * size] = __syncthreads_and(value != 5);
}

// A [16, K] and B [K, 8] row-major in memory; y = D [16, 8]. n: 0 f16, 1 bf16, 2.. s8s8, u8s8, s8u8, u8u8
__global__ void mma(const void* a, const void* b, void* y, int n) {
  const unsigned lane = threadIdx.x, group = lane / 4, t = lane % 4;
  const unsigned per_word = n < 2 ? 2 : 4, k = n < 2 ? 16 : 32, bits = 32 / per_word;
  const auto element = [&](const void* p, unsigned index) -> uint32_t {
    return per_word == 2 ? static_cast<const unsigned short*>(p)[index] : static_cast<const unsigned char*>(p)[index];
  };
  uint32_t fa[4] = {}, fb[2] = {};
  for (unsigned j = 0; j < per_word; ++j) {
    for (unsigned i = 0; i < 4; ++i) {
      fa[i] |= element(a, (group + i % 2 * 8) * k + per_word * t + j + i / 2 * (k / 2)) << bits * j;
    }
    for (unsigned i = 0; i < 2; ++i) fb[i] |= element(b, (per_word * t + j + i * (k / 2)) * 8 + group) << bits * j;
  }
  float d[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  int e[4] = {1, 1, 1, 1};
  if (n == 0) mma_f16(d, fa, fb);
  if (n == 1) mma_bf16(d, fa, fb);
  if (n == 2) mma_s8(e, fa, fb);
  if (n == 3) mma_u8s8(e, fa, fb);
  if (n == 4) mma_s8u8(e, fa, fb);
  if (n == 5) mma_u8(e, fa, fb);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned at = (group + i / 2 * 8) * 8 + 2 * t + i % 2;
    if (n < 2) {
      static_cast<float*>(y)[at] = d[i];
    } else {
      static_cast<int*>(y)[at] = e[i];
    }
  }
}

// The same product of halves with fragments by ldmatrix. n: 0 B [K, 8] by _trans; 1 B as [8, K]; 2 by x2 and x1 only;
// 3 A as [K, 16] by _trans
__global__ void mma_ldmatrix(const void* a, const void* b, void* y, int n) {
  LUTGEMM_SHARED(__half, tile_a, [16][16]);
  LUTGEMM_SHARED(__half, tile_b, [16][8]);
  const unsigned lane = threadIdx.x;
  store16(&tile_a[0][0] + lane * 8, load16(static_cast<const __half*>(a) + lane * 8));
  if (lane < 16) store16(&tile_b[0][0] + lane * 8, load16(static_cast<const __half*>(b) + lane * 8));
  __syncthreads();
  uint32_t fa[4], fb[2];
  if (n == 3) {
    ldmatrix_x4_trans(fa, &tile_a[lane / 16 * 8 + lane % 8][lane / 8 % 2 * 8]);
  } else if (n < 2) {
    ldmatrix_x4(fa, &tile_a[lane % 16][lane / 16 * 8]);
  } else {
    uint32_t half_a[2];
    ldmatrix_x2(half_a, &tile_a[lane % 16][0]);
    fa[0] = half_a[0];
    fa[1] = half_a[1];
    ldmatrix_x2(half_a, &tile_a[lane % 16][8]);
    fa[2] = half_a[0];
    fa[3] = half_a[1];
  }
  const __half* columns = &tile_b[0][0];  // [8][16] when n == 1
  if (n == 0 || n == 3) {
    ldmatrix_x2_trans(fb, &tile_b[lane % 16][0]);
  } else if (n == 1) {
    ldmatrix_x2(fb, columns + lane % 8 * 16 + lane / 8 % 2 * 8);
  } else {
    uint32_t one[1];
    ldmatrix_x1_trans(one, &tile_b[lane % 8][0]);
    fb[0] = one[0];
    ldmatrix_x1_trans(one, &tile_b[8 + lane % 8][0]);
    fb[1] = one[0];
  }
  float d[4] = {};
  mma_f16(d, fa, fb);
  for (unsigned i = 0; i < 4; ++i) static_cast<float*>(y)[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// y = a doubled, through a ring of two stages in shared memory; words from n on are not copied but zero. 128 threads,
// a multiple of 128 * 4 words a block.
__global__ void copy_ring(const void* a, const void* b, void* y, int n) {
  uint32_t* ring = reinterpret_cast<uint32_t*>(dynamic_shared());  // [2][512]
  const uint32_t* source = static_cast<const uint32_t*>(a);
  const int tiles = static_cast<const int*>(b)[0];
  const int thread = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int at = tile * 512 + thread * 4;
      cp_async16(ring + tile % 2 * 512 + thread * 4, source + at, at < n);
    }
    cp_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    cp_async_wait<1>();
    __syncthreads();
    for (int i = 0; i < 4; ++i) {
      const int at = i * 128 + (thread + 5) % 128;
      static_cast<uint32_t*>(y)[tile * 512 + at] = 2 * ring[tile % 2 * 512 + at];
    }
    __syncthreads();
  }
}

// y = a, 16 words a thread by loads and copies of every width; odd threads get 0 as the last word
__global__ void copies(const void* a, const void*, void* y, int) {
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t* source = static_cast<const uint32_t*>(a) + thread * 16;
  uint32_t* staged = reinterpret_cast<uint32_t*>(dynamic_shared()) + thread * 16;
  uint32_t* target = static_cast<uint32_t*>(y) + thread * 16;
  cp_async16_stream(staged + 8, source + 8);
  cp_async8(staged + 12, source + 12);
  cp_async_commit();
  cp_async4(staged + 14, source + 14);
  cp_async4(staged + 15, source + 15, thread % 2 == 0);
  cp_async_commit();
  store16(target, load_stream16(source));
  store8(target + 4, load_stream8(source + 4));
  target[6] = load_stream4(source + 6);
  target[7] = __ldg(source + 7);
  cp_async_wait<1>();
  store16(target + 8, load16(staged + 8));
  store8(target + 12, load8(staged + 12));
  cp_async_wait<0>();
  store8(target + 14, load8(staged + 14));
}

// y: sum, maximum and count of a, by shared atomics; blocks of (x, y) threads
__global__ void atomics(const void* a, const void*, void* y, int n) {
  LUTGEMM_SHARED(int, totals, [2]);
  LUTGEMM_SHARED(float, count, );
  const int i = static_cast<int>(threadIdx.x + blockDim.x * threadIdx.y);
  if (i == 0) {
    totals[0] = 0;
    totals[1] = -1000;
    count = 0.0f;
  }
  __syncthreads();
  if (i < n) {
    atomicAdd(&totals[0], static_cast<const int*>(a)[i]);
    atomicMax(&totals[1], static_cast<const int*>(a)[i]);
    atomicAdd(&count, 1.0f);
  }
  __syncthreads();
  if (i == 0) {
    static_cast<int*>(y)[0] = totals[0];
    static_cast<int*>(y)[1] = totals[1];
    static_cast<int*>(y)[2] = static_cast<int>(count);
  }
}

}  // namespace
}  // namespace lutgemm

using namespace lutgemm;
LUTGEMM_TEST_KERNELS(run_primitive, {"widen", widen}, {"narrow", narrow}, {"arithmetic_half", arithmetic<__half2>},
                     {"arithmetic_bfloat16", arithmetic<__nv_bfloat162>}, {"integers", integers},
                     {"shuffles", shuffles}, {"mma", lutgemm::mma}, {"mma_ldmatrix", mma_ldmatrix},
                     {"copy_ring", copy_ring}, {"copies", copies}, {"atomics", atomics})
