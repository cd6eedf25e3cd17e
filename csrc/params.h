// Problem structs that bindings fill and kernels read. No torch header here or in anything that includes this.
//
//   y[M, N] = x[M, K] @ W[N, K].T + bias        M tokens, N out_features, K in_features
#pragma once

#include <cstdint>

namespace lutgemm {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUInt8 = 3 };

// Instruction sets of this architecture, each including the ones before it. kAvx512 = F, BW, DQ and VL; kAvx512Vbmi
// adds VBMI, VNNI and GFNI.
#if defined(__aarch64__)
enum class Isa : int { kScalar = 0, kNeon = 1 };
constexpr Isa kLastIsa = Isa::kNeon;
#else
enum class Isa : int { kScalar = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Vbmi = 3 };
constexpr Isa kLastIsa = Isa::kAvx512Vbmi;
#endif

// The least accuracy asked for: tables of 8, 12 or 16 bits, or fp32. A kernel may be more accurate than asked.
enum class Accuracy : int { kFast = 0, kAccurate = 1, kNearExact = 2, kExact = 3 };

// Most N, K and group_size: far above any model, small enough that no size overflows an int64 (MAX_FEATURES of the
// formats).
constexpr int64_t kMaxFeatures = int64_t(1) << 24;

// A BCQ weight as SPEC.md stores it (section 2). The ratio kind reaches kernels in its free form.
struct BcqWeight {
  int64_t N, K, G, words;  // G = ceil(K / group_size), words = ceil(K / 32)
  int64_t group_size;      // a multiple of 32, or >= K
  int bits;                // 1..8
  bool uniform;            // scales hold s [N, G] and zeros [N, G] replace offsets
  const uint32_t* codes;   // [bits, N, words], bit k % 32 of word k / 32
  const void* scales;      // [bits, N, G], or [N, G] when uniform
  DType scale_dtype;       // float types
  const void* offsets;     // [N, G] of scale_dtype, or null
  const void* zeros;       // [N, G] of zeros_dtype, only when uniform
  DType zeros_dtype;       // kUInt8 or a float type
};

// A codebook weight as SPEC.md stores it (section 3).
struct CodebookWeight {
  int64_t N, K, G, J;     // G = ceil(K / group_size), J = ceil(K / vec_len)
  int64_t group_size;     // a multiple of vec_len, or >= K
  int num_codebooks;      // 1..4
  int vec_len;            // 2, 4, 8, 16
  int codebook_bits;      // 1..12
  const void* codes;      // [num_codebooks, N, J], uint8, or int16 when codebook_bits > 8
  const void* codebooks;  // [num_codebooks, 1 << codebook_bits, vec_len] of scale_dtype
  const void* scales;     // [N, G] of scale_dtype
  DType scale_dtype;      // float types
};

// Activations and result: contiguous x [M, K], bias [N] or null, y [M, N], all of one float dtype.
struct Io {
  int64_t M;
  const void* x;
  const void* bias;
  void* y;
  DType dtype;
};

}  // namespace lutgemm
