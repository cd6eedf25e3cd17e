// Look-ups in planes of 256 bytes by AVX-512 VBMI. Included inside a target region, hence in an unnamed namespace and
// with no include guard; the intrinsics must have been seen before the region.

namespace lutgemm {
namespace {

constexpr int kPlaneBytes = 256;
constexpr int kHalves = kBlockRows / 64;

// gcc would rather read a plane twice from memory than hold it in registers for a second look-up.
inline void hold(__m512i& v) { asm("" : "+v"(v)); }

// The bytes of a plane that 64 codes name. kVectors = 4 for 8-bit codes, 2 for 7, 1 for 6 and fewer.
// vpermi2b reads 128 bytes and ignores code bit 7. So one runs masked over the codes that have the bit, on the upper
// half, and one over the others, on the lower half; it leaves alone what the first has looked up.
template <int kVectors>
inline __m512i look_up64(const __m512i* plane, __m512i codes, __mmask64 upper, __mmask64 lower) {
  if constexpr (kVectors == 1) return _mm512_permutexvar_epi8(codes, plane[0]);
  if constexpr (kVectors == 2) return _mm512_permutex2var_epi8(plane[0], codes, plane[1]);
  const __m512i found = _mm512_mask2_permutex2var_epi8(plane[2], codes, upper, plane[3]);
  return _mm512_mask2_permutex2var_epi8(plane[0], found, lower, plane[1]);
}

// The bytes of each plane that one entry's codes name, for the rows of a block.
template <int kPlanes, int kVectors>
[[gnu::always_inline]] inline void look_up(const uint8_t* from, const uint8_t* table, __m512i (*found)[kHalves]) {
  __m512i codes[kHalves];
  __mmask64 upper[kHalves], lower[kHalves];
  for (int h = 0; h < kHalves; ++h) {
    codes[h] = _mm512_loadu_si512(from + 64 * h);
    hold(codes[h]);
    upper[h] = _mm512_movepi8_mask(codes[h]);
    lower[h] = _mm512_testn_epi8_mask(codes[h], _mm512_set1_epi8(-128));
  }
  for (int b = 0; b < kPlanes; ++b, table += kPlaneBytes) {
    __m512i plane[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      plane[v] = _mm512_loadu_si512(table + 64 * v);
      hold(plane[v]);
    }
    for (int h = 0; h < kHalves; ++h) found[b][h] = look_up64<kVectors>(plane, codes[h], upper[h], lower[h]);
  }
}

}  // namespace
}  // namespace lutgemm
