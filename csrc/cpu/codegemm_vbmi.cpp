// CodeGEMM with AVX-512 VBMI for one token: look-ups in registers, exact in fp32.
//
// A table of up to 256 fp32 is kept as four planes of bytes. vpermi2b reads 128 of a plane's bytes for 64 codes at
// once; code bit 7 picks between two of them. Four such results, interleaved by bytes, are 64 fp32 values, whole:
//
//   plane b of 64 codes  ->  vpunpck{l,h}bw (0,1), (2,3)  ->  vpunpck{l,h}wd  ->  4 vectors of 16 fp32
//
// The order of rows that comes out is row_of_position of codebook.h. 20 shuffles and blends serve 64 look-ups,
// where loads from L1 would take 64.
#include "isa.h"

#if LUTGEMM_X86
#include <immintrin.h>

#include "codebook.h"
#include "convert.h"
#include "lut_avx512.h"

LUTGEMM_TARGET_AVX512VBMI_BEGIN
#include "byte_planes_vbmi.h"
#include "codegemm_planes_vbmi.h"

namespace lutgemm {
namespace {

// Reads ahead in the stream of codes, into L2: the eight blocks after which the driver turns to the next part of a
// tile.
constexpr int kPrefetchBytes = 34 << 10;

constexpr int kTableBytes = 4 * kPlaneBytes;

// 64 fp32 -> 64 bytes of each of the four planes.
inline void store_planes(const __m512* values, uint8_t* planes) {
  __m512i v[4], byte[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm512_castps_si512(values[i]);
  pick_bytes<0>(v, &byte[0], &byte[1]);
  pick_bytes<2>(v, &byte[2], &byte[3]);
  for (int b = 0; b < 4; ++b) _mm512_storeu_si512(planes + b * kPlaneBytes, byte[b]);
}

void build(const BuildArgs& a) {
  uint8_t* table = static_cast<uint8_t*>(a.tables);
  for (int e = 0; e < a.entries; ++e, table += kTableBytes) {
    const int64_t j = (a.first_entry + e) / a.num_codebooks, c = (a.first_entry + e) % a.num_codebooks;
    const float* codebook = a.codebooks + c * a.vec_len * a.table_entries;
    const float* x = a.x + j * a.vec_len;
    for (int i = 0; i < a.used_entries; i += 64) {  // past used_entries the codebook is zeros
      __m512 sum[4];
      for (__m512& s : sum) s = _mm512_setzero_ps();
      for (int d = 0; d < a.vec_len; ++d) {
        const __m512 xd = _mm512_set1_ps(x[d]);
        const float* centroids = codebook + d * a.table_entries + i;
        for (int u = 0; u < 4; ++u) sum[u] = _mm512_fmadd_ps(_mm512_loadu_ps(centroids + 16 * u), xd, sum[u]);
      }
      store_planes(sum, table + i);
    }
  }
}

template <int kVectors>
void gather_block(const GatherArgs& a) {
  __m512 sum[kHalves][4];
  for (int h = 0; h < kHalves; ++h) {
    for (int v = 0; v < 4; ++v) {
      sum[h][v] = a.first ? _mm512_setzero_ps() : _mm512_loadu_ps(a.partial + h * 64 + v * 16);
    }
  }
  const uint8_t* row_codes = a.codes;
  const uint8_t* table = static_cast<const uint8_t*>(a.tables);
  for (int e = 0; e < a.entries; ++e, row_codes += kBlockRows, table += kTableBytes) {
    __m512i bytes[4][kHalves];
    look_up<4, kVectors>(row_codes, table, bytes);
    for (int h = 0; h < kHalves; ++h) {
      _mm_prefetch(reinterpret_cast<const char*>(row_codes) + h * 64 + kPrefetchBytes, _MM_HINT_T1);
    }
    for (int h = 0; h < kHalves; ++h) {
      const __m512i b0 = bytes[0][h], b1 = bytes[1][h], b2 = bytes[2][h], b3 = bytes[3][h];
      const __m512i low[2] = {_mm512_unpacklo_epi8(b0, b1), _mm512_unpackhi_epi8(b0, b1)};
      const __m512i high[2] = {_mm512_unpacklo_epi8(b2, b3), _mm512_unpackhi_epi8(b2, b3)};
      for (int v = 0; v < 4; v += 2) {
        const __m512i even = _mm512_unpacklo_epi16(low[v / 2], high[v / 2]);
        const __m512i odd = _mm512_unpackhi_epi16(low[v / 2], high[v / 2]);
        sum[h][v] = _mm512_add_ps(sum[h][v], _mm512_castsi512_ps(even));
        sum[h][v + 1] = _mm512_add_ps(sum[h][v + 1], _mm512_castsi512_ps(odd));
      }
    }
  }
  if (a.last) {
    const int scale_bytes = kBlockRows * (a.scale_dtype == DType::kFloat32 ? 4 : 2);
    const char* next = static_cast<const char*>(a.scales) + kPrefetchBytes;
    for (int i = 0; i < scale_bytes; i += 64) _mm_prefetch(next + i, _MM_HINT_T1);
  }
  for (int h = 0; h < kHalves; ++h) {
    for (int v = 0; v < 4; ++v) {
      const int row = h * 64 + v * 16;
      if (a.last) {
        _mm512_storeu_ps(a.y + row, _mm512_fmadd_ps(avx512::load16(a.scales, a.scale_dtype, row), sum[h][v],
                                                    _mm512_loadu_ps(a.y + row)));
      } else {
        _mm512_storeu_ps(a.partial + row, sum[h][v]);
      }
    }
  }
}

void gather(const GatherArgs& a) {
  if (a.used_entries > 128) {
    gather_block<4>(a);
  } else if (a.used_entries > 64) {
    gather_block<2>(a);
  } else {
    gather_block<1>(a);
  }
}

}  // namespace

const CodegemmKernel kCodegemmVbmi{1, kTileEntries, 16, build, gather};

}  // namespace lutgemm

LUTGEMM_TARGET_END
#endif
