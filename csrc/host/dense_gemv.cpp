#include "dense_gemv.h"

#include <cstring>

#include "../cpu/isa.h"

#if LUTGEMM_X86
#include <immintrin.h>
#endif

namespace lutgemm::host {
namespace {

// There is no software prefetch: the rows are one stream in order, which the hardware prefetches. On Zen 4 asking for
// lines 0.5 to 16 KiB ahead made the AVX-512 loop 1.3 to 1.5 times slower, with pages of 4 KiB and of 2 MiB.

float to_float(float value) { return value; }

float to_float(uint16_t bf16) {
  const uint32_t bits = uint32_t(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
float dot_from(const T* row, const float* x, int64_t begin, int64_t K) {
  float sum = 0;
  for (int64_t k = begin; k < K; ++k) sum += to_float(row[k]) * x[k];
  return sum;
}

template <class T>
void gemv_scalar(const T* weight, const float* x, float* y, int64_t N, int64_t K) {
  for (int64_t n = 0; n < N; ++n) y[n] = dot_from(weight + n * K, x, 0, K);
}

}  // namespace

#if LUTGEMM_X86

LUTGEMM_TARGET_AVX512_BEGIN
namespace avx512 {
namespace {

__m512 widen(const float* w) { return _mm512_loadu_ps(w); }

__m512 widen(const uint16_t* w) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

template <class T>
void gemv(const T* weight, const float* x, float* y, int64_t N, int64_t K) {
  constexpr int64_t kStep = 64;  // four chains of additions hide the latency of one
  for (int64_t n = 0; n < N; ++n) {
    const T* row = weight + n * K;
    __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
      for (int part = 0; part < 4; ++part) {
        const int64_t at = k + 16 * part;
        sum[part] = _mm512_fmadd_ps(widen(row + at), _mm512_loadu_ps(x + at), sum[part]);
      }
    }
    const __m512 total = _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    y[n] = _mm512_reduce_add_ps(total) + dot_from(row, x, k, K);
  }
}

}  // namespace
}  // namespace avx512
LUTGEMM_TARGET_END

LUTGEMM_TARGET_AVX2_BEGIN
namespace avx2 {
namespace {

__m256 widen(const float* w) { return _mm256_loadu_ps(w); }

__m256 widen(const uint16_t* w) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <class T>
void gemv(const T* weight, const float* x, float* y, int64_t N, int64_t K) {
  constexpr int64_t kStep = 32;
  for (int64_t n = 0; n < N; ++n) {
    const T* row = weight + n * K;
    __m256 sum[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
      for (int part = 0; part < 4; ++part) {
        const int64_t at = k + 8 * part;
        sum[part] = _mm256_fmadd_ps(widen(row + at), _mm256_loadu_ps(x + at), sum[part]);
      }
    }
    const __m256 total = _mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3]));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(total), _mm256_extractf128_ps(total, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    y[n] = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two))) + dot_from(row, x, k, K);
  }
}

}  // namespace
}  // namespace avx2
LUTGEMM_TARGET_END

#endif

namespace {

template <class T>
void dispatch(const T* weight, const float* x, float* y, int64_t N, int64_t K, Isa isa) {
#if LUTGEMM_X86
  if (isa >= Isa::kAvx512) return avx512::gemv(weight, x, y, N, K);
  if (isa >= Isa::kAvx2) return avx2::gemv(weight, x, y, N, K);
#endif
  (void)isa;
  gemv_scalar(weight, x, y, N, K);
}

}  // namespace

void dense_gemv(const float* weight, const float* x, float* y, int64_t N, int64_t K, Isa isa) {
  dispatch(weight, x, y, N, K, isa);
}

void dense_gemv(const uint16_t* weight, const float* x, float* y, int64_t N, int64_t K, Isa isa) {
  dispatch(weight, x, y, N, K, isa);
}

}  // namespace lutgemm::host
