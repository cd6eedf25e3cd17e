// BCQ by look-ups of nibbles with NEON (tbl), which every 64-bit ARM CPU has, and its tables.
#include "isa.h"
#if LUTGEMM_ARM64
#include <arm_neon.h>

#include <cmath>

#include "byte_kernels.h"
#include "byte_nibble.h"

namespace lutgemm::neon {
namespace {

struct Vector16 {
  using Bytes = uint8x16_t;
  using Words = uint16x8_t;
  using Floats = float32x4_t;
  static constexpr int kBytes = 16;
  static constexpr int kPlanes = 1, kBlocks = 1;  // at once: four vectors' sums and four tables

  static void keep(uint8x16_t&) {}

  struct ByteSum {
    uint16x8_t low, high;  // of bytes 0-7 and 8-15

    void clear() { low = high = vdupq_n_u16(0); }
    void add(uint8x16_t bytes) {
      low = vaddw_u8(low, vget_low_u8(bytes));
      high = vaddw_high_u8(high, bytes);
    }
    void words(uint16x8_t (&out)[2]) const {
      out[0] = low;
      out[1] = high;
    }
  };

  static uint8x16_t load(const uint8_t* p) { return vld1q_u8(p); }
  static uint8x16_t table(const uint8_t* p) { return vld1q_u8(p); }
  static uint8x16_t low_nibbles(uint8x16_t v) { return vandq_u8(v, vdupq_n_u8(15)); }
  static uint8x16_t high_nibbles(uint8x16_t v) { return vshrq_n_u8(v, 4); }
  static uint8x16_t look_up(uint8x16_t table, uint8x16_t index) { return vqtbl1q_u8(table, index); }
  static uint8x16_t set_bytes(uint8_t v) { return vdupq_n_u8(v); }
  static uint8x16_t add_bytes(uint8x16_t a, uint8x16_t b) { return vaddq_u8(a, b); }
  static uint16x8_t add_words(uint16x8_t a, uint16x8_t b) { return vaddq_u16(a, b); }
  static void shifted(uint8x16_t bytes, uint16x8_t (&out)[2]) {
    out[0] = vshll_n_u8(vget_low_u8(bytes), 8);
    out[1] = vshll_high_n_u8(bytes, 8);
  }
  static void floats(const uint16x8_t (&words)[2], float bias, float32x4_t (&out)[4]) {
    for (int i = 0; i < 2; ++i) {
      out[2 * i] = vsubq_f32(vcvtq_f32_u32(vmovl_u16(vget_low_u16(words[i]))), vdupq_n_f32(bias));
      out[2 * i + 1] = vsubq_f32(vcvtq_f32_u32(vmovl_high_u16(words[i])), vdupq_n_f32(bias));
    }
  }
  static float32x4_t set(float v) { return vdupq_n_f32(v); }
  static float32x4_t load_floats(const float* p) { return vld1q_f32(p); }
  static void store(float* p, float32x4_t v) { vst1q_f32(p, v); }
  static float32x4_t load_scales(const void* data, DType dtype, int64_t index) {
    if (dtype == DType::kFloat32) return vld1q_f32(static_cast<const float*>(data) + index);
    const uint16x4_t raw = vld1_u16(static_cast<const uint16_t*>(data) + index);
    if (dtype == DType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(raw));
    return vreinterpretq_f32_u32(vshll_n_u16(raw, 16));
  }
  static float32x4_t load_bytes(const uint8_t* p) {
    const float four[4] = {float(p[0]), float(p[1]), float(p[2]), float(p[3])};
    return vld1q_f32(four);
  }
  static float32x4_t add(float32x4_t a, float32x4_t b) { return vaddq_f32(a, b); }
  static float32x4_t sub(float32x4_t a, float32x4_t b) { return vsubq_f32(a, b); }
  static float32x4_t mul(float32x4_t a, float32x4_t b) { return vmulq_f32(a, b); }
  static float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
};

// The sum of 4 lanes, in one fixed order.
inline float lane_sum(float32x4_t v) { return vaddvq_f32(v); }

}  // namespace

SpanSums nibble_span_sums(const float* x, int64_t slices) {
  float32x4_t sum = vdupq_n_f32(0.0f), total = sum;
  float largest = 0.0f;
  for (int64_t nibble = 0; nibble < 2 * slices; ++nibble, x += 4) {
    const float32x4_t v = vld1q_f32(x), size = vabsq_f32(v);
    sum = vaddq_f32(sum, v);
    total = vaddq_f32(total, size);
    largest = std::fmax(largest, lane_sum(size));
  }
  const float all = lane_sum(total);
  return {lane_sum(sum), all, largest + all * 0.0f};
}

// Entry e = +-x0 +-x1 +-x2 +-x3 by the bits of e: vector q holds the four of bits 2 and 3.
void build_nibble_tables(Accuracy accuracy, const float* x, int64_t slices, const SpanSums& sums, uint8_t* tables,
                         float* step) {
  const float inverse = nibble_step(accuracy, slices, sums, step);
  const float first[4] = {-1.0f, 1.0f, -1.0f, 1.0f}, second[4] = {-1.0f, -1.0f, 1.0f, 1.0f};
  const float32x4_t sign0 = vld1q_f32(first), sign1 = vld1q_f32(second);
  const uint16x8_t bias = vdupq_n_u16(accuracy == Accuracy::kFast       ? 0x80
                                      : accuracy == Accuracy::kAccurate ? 0
                                                                        : 0x8000);
  for (int64_t nibble = 0; nibble < 2 * slices; ++nibble, x += 4) {
    const float32x4_t two = vaddq_f32(vmulq_n_f32(sign0, x[0] * inverse), vmulq_n_f32(sign1, x[1] * inverse));
    const float third = x[2] * inverse, fourth = x[3] * inverse;
    int16x4_t words[4];
    for (int q = 0; q < 4; ++q) {
      const float32x4_t three = vaddq_f32(two, vdupq_n_f32(q & 1 ? third : -third));
      words[q] = vqmovn_s32(vcvtnq_s32_f32(vaddq_f32(three, vdupq_n_f32(q & 2 ? fourth : -fourth))));
    }
    const uint16x8_t low = veorq_u16(vreinterpretq_u16_s16(vcombine_s16(words[0], words[1])), bias);
    const uint16x8_t high = veorq_u16(vreinterpretq_u16_s16(vcombine_s16(words[2], words[3])), bias);
    const uint8x16_t bytes0 = vcombine_u8(vmovn_u16(low), vmovn_u16(high));
    const uint8x16_t bytes1 = vcombine_u8(vshrn_n_u16(low, 8), vshrn_n_u16(high, 8));
    if (accuracy == Accuracy::kFast) {
      vst1q_u8(tables + 16 * nibble, bytes0);
    } else {
      vst1q_u8(tables + 32 * nibble, bytes0);
      vst1q_u8(tables + 32 * nibble + 16, bytes1);
    }
  }
}

void add_nibble_span(Accuracy accuracy, const ByteTask& task) { add_span_of<Vector16>(accuracy, task); }

}  // namespace lutgemm::neon
#endif
