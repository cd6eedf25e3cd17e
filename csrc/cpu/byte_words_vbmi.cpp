// BiQGEMM by 6 signs at a time from folded codes, which GFNI unfolds in one instruction.
#include "isa.h"
#if LUTGEMM_X86
#include "byte_kernels.h"
#include "byte_scales_avx512.h"

LUTGEMM_TARGET_AVX512VBMI_BEGIN
namespace lutgemm {
namespace {

// The code bytes of a slice, unfolded (byte_layout.h): bit i < 7 becomes bit i ^ bit 7, and bit 7 is inverted. Rows of
// the bit matrix stand in descending order of the bit that they make.
inline __m512i load_codes(const uint8_t* codes) {
  const __m512i matrix = _mm512_set1_epi64(int64_t(0x8182'8488'90A0'C080));
  return _mm512_gf2p8affine_epi64_epi8(_mm512_loadu_si512(codes), matrix, 0x80);
}

}  // namespace
}  // namespace lutgemm

#include "byte_words.h"

namespace lutgemm::vbmi {

void add_word_span(const WordTask& task) { add_words(task); }

}  // namespace lutgemm::vbmi
LUTGEMM_TARGET_END
#endif
