// 64 numbers of 32 bits to planes of their bytes. Included inside a target region with AVX-512 VBMI, hence in an
// unnamed namespace and with no include guard; the intrinsics must have been seen before the region.

namespace lutgemm {
namespace {

// vpermi2b index: bytes p of the 32 dwords in two vectors, then their bytes p + 1.
struct PickBytes {
  alignas(64) uint8_t bytes[64] = {};
  explicit constexpr PickBytes(int p) {
    for (int i = 0; i < 32; ++i) {
      bytes[i] = uint8_t(4 * i + p);
      bytes[32 + i] = uint8_t(4 * i + p + 1);
    }
  }
};
template <int p>
constexpr PickBytes kPickBytes{p};

// Bytes p and p + 1 of 64 dwords.
template <int p>
[[gnu::always_inline]] inline void pick_bytes(const __m512i* v, __m512i* low, __m512i* high) {
  const __m512i index = _mm512_load_si512(kPickBytes<p>.bytes);
  const __m512i first = _mm512_permutex2var_epi8(v[0], index, v[1]);
  const __m512i second = _mm512_permutex2var_epi8(v[2], index, v[3]);
  *low = _mm512_shuffle_i64x2(first, second, 0x44);
  *high = _mm512_shuffle_i64x2(first, second, 0xEE);
}

}  // namespace
}  // namespace lutgemm
