// W[n, k] = base[n, g] + sum over b of scale[b, n, g] * sign(b, n, k), and for the uniform kind s[n, g] times that sum,
// in fp32 and in this order (SPEC.md, section 2), then rounded once to the dtype asked for.
#include "bcq.h"
#include "convert.h"
#include "isa.h"

namespace lutgemm {
namespace scalar {

void dequantize_row(const DequantizeRow& row, float* out) {
  for (int64_t g = 0; g < row.G; ++g) {
    const int64_t first = g * row.words_per_group * 32;
    const int64_t stop = g + 1 < row.G ? first + row.words_per_group * 32 : row.K;
    for (int64_t k = first; k < stop; ++k) {
      float value = row.base[g];
      for (int b = 0; b < row.bits; ++b) {
        const float scale = row.scales[b * row.G + g];
        value += (row.codes[b][k / 32] >> (k % 32)) & 1u ? scale : -scale;
      }
      out[k] = row.unit ? row.unit[g] * value : value;
    }
  }
}

}  // namespace scalar

namespace {

// The group constants of row n in fp32: base [G], scales [bits][G], unit [G].
void load_constants(const BcqWeight& weight, Isa isa, int64_t n, float* base, float* scales, float* unit) {
  const int64_t G = weight.G, size = dtype_bytes(weight.scale_dtype);
  const auto load = [&](const void* source, int64_t index, float* out) {
    load_floats(isa, weight.scale_dtype, static_cast<const uint8_t*>(source) + index * G * size, G, out);
  };
  if (weight.uniform) {
    load(weight.scales, n, unit);
    const float middle = float((1 << weight.bits) - 1) / 2;
    for (int64_t g = 0; g < G; ++g) base[g] = middle - load_float(weight.zeros, weight.zeros_dtype, n * G + g);
    for (int b = 0; b < weight.bits; ++b) {
      const float place = float(1 << (weight.bits - 1 - b)) / 2;
      for (int64_t g = 0; g < G; ++g) scales[b * G + g] = place;
    }
    return;
  }
  for (int b = 0; b < weight.bits; ++b) load(weight.scales, b * weight.N + n, scales + b * G);
  if (weight.offsets) {
    load(weight.offsets, n, base);
  } else {
    for (int64_t g = 0; g < G; ++g) base[g] = 0.0f;
  }
}

}  // namespace

void bcq_dequantize_rows(const BcqWeight& weight, Isa isa, int64_t begin, int64_t end, DType dtype, void* out) {
  const int64_t G = weight.G;
  const auto base = make_scratch<float>(G), scales = make_scratch<float>(G * weight.bits),
             unit = make_scratch<float>(G);
  const auto values = make_scratch<float>(weight.words * 32);
  DequantizeRow row{weight.K,
                    G,
                    G == 1 ? weight.words : weight.group_size / 32,
                    weight.bits,
                    {},
                    base.get(),
                    scales.get(),
                    weight.uniform ? unit.get() : nullptr};
  for (int64_t n = begin; n < end; ++n) {
    load_constants(weight, isa, n, base.get(), scales.get(), unit.get());
    for (int b = 0; b < weight.bits; ++b) row.codes[b] = weight.codes + (b * weight.N + n) * weight.words;
#if LUTGEMM_X86
    if (isa >= Isa::kAvx512) {
      avx512::dequantize_row(row, values.get());
    } else if (isa == Isa::kAvx2) {
      avx2::dequantize_row(row, values.get());
    } else {
      scalar::dequantize_row(row, values.get());
    }
#else
    scalar::dequantize_row(row, values.get());
#endif
    store_floats(isa, dtype, values.get(), weight.K,
                 static_cast<uint8_t*>(out) + (n - begin) * weight.K * dtype_bytes(dtype));
  }
}

}  // namespace lutgemm
