// CodeGEMM with AVX-512 for 16 tokens: a code fetches one 64-byte line that holds its product with each of them.
#include "isa.h"

#if LUTGEMM_X86
#include <immintrin.h>

#include "codebook.h"
#include "convert.h"

LUTGEMM_TARGET_AVX512_BEGIN
#include "codegemm_lanes.h"

namespace lutgemm {
namespace {

struct Lanes16 {
  using type = __m512;
  static constexpr int kWidth = 16;
  static type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  static type set1(float v) { return _mm512_set1_ps(v); }
  static type zero() { return _mm512_setzero_ps(); }
  static type add(type a, type b) { return _mm512_add_ps(a, b); }
  static type fma(type a, type b, type c) { return _mm512_fmadd_ps(a, b, c); }
};

}  // namespace

const CodegemmKernel kCodegemmAvx512x16{16, 16, 16, build_lanes<Lanes16>, gather_lanes<Lanes16>};

}  // namespace lutgemm

LUTGEMM_TARGET_END
#endif
