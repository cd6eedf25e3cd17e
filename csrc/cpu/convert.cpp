#include "convert.h"

#include "isa.h"

#if LUTGEMM_X86
#include <immintrin.h>
#endif

namespace lutgemm {
namespace {

#if LUTGEMM_X86
LUTGEMM_TARGET_AVX2_BEGIN

// Both return how many values, a multiple of 8, they did.
int64_t load_floats_avx2(DType dtype, const uint16_t* src, int64_t count, float* dst) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    const __m256 value = dtype == DType::kFloat16
                             ? _mm256_cvtph_ps(raw)
                             : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
    _mm256_storeu_ps(dst + i, value);
  }
  return i;
}

int64_t store_halves_avx2(const float* src, int64_t count, uint16_t* dst) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i raw = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), raw);
  }
  return i;
}

LUTGEMM_TARGET_END
#endif

}  // namespace

void load_floats([[maybe_unused]] Isa isa, DType dtype, const void* src, int64_t count, float* dst) {
  if (dtype == DType::kFloat32) {
    if (count > 0) std::memcpy(dst, src, size_t(count) * sizeof(float));
    return;
  }
  const auto* raw = static_cast<const uint16_t*>(src);
  int64_t i = 0;
#if LUTGEMM_X86
  if (isa >= Isa::kAvx2) i = load_floats_avx2(dtype, raw, count, dst);
#endif
  if (dtype == DType::kFloat16) {
    for (; i < count; ++i) dst[i] = half_to_float(raw[i]);
  } else {
    for (; i < count; ++i) dst[i] = bf16_to_float(raw[i]);
  }
}

void store_floats([[maybe_unused]] Isa isa, DType dtype, const float* src, int64_t count, void* dst) {
  if (dtype == DType::kFloat32) {
    if (count > 0) std::memcpy(dst, src, size_t(count) * sizeof(float));
    return;
  }
  auto* raw = static_cast<uint16_t*>(dst);
  int64_t i = 0;
  if (dtype == DType::kFloat16) {
#if LUTGEMM_X86
    if (isa >= Isa::kAvx2) i = store_halves_avx2(src, count, raw);
#endif
    for (; i < count; ++i) raw[i] = float_to_half(src[i]);
  } else {
    for (; i < count; ++i) raw[i] = float_to_bf16(src[i]);
  }
}

}  // namespace lutgemm
