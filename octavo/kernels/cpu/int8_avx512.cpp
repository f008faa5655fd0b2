// Integer products in AVX-512 with VNNI: a word of sixteen rows in a register.
#include "int8.h"

#include <algorithm>
#include <cstring>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#define OCTAVO_ISA avx512
#define OCTAVO_LANES 16
#include "int8_words.h"

namespace octavo {
inline namespace OCTAVO_ISA {

constexpr int kTokens = 8;  // of a tile

// The float16 numbers in the low halves.
OCTAVO_INLINE Floats halves(Words v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
OCTAVO_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// The word at `at` of each row.
OCTAVO_INLINE Words word(const uint8_t* at, int64_t stride) {
  return _mm512_i32gather_epi32(row_offsets(stride), at, 1);
}
// The four words from `at` on of each row.
OCTAVO_INLINE void words4(const uint8_t* at, int64_t stride, Words w[4]) {
  Words rows[4];  // i, i + 4, i + 8, i + 12
  for (int i = 0; i < 4; ++i) {
    const uint8_t* p = at + i * stride;
    rows[i] = _mm512_castsi128_si512(load16(p));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x00f0, load16(p + 4 * stride));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0x0f00, load16(p + 8 * stride));
    rows[i] = _mm512_mask_broadcast_i32x4(rows[i], 0xf000, load16(p + 12 * stride));
  }
  const Words a = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const Words b = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const Words c = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const Words d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  w[0] = _mm512_unpacklo_epi64(a, c);
  w[1] = _mm512_unpackhi_epi64(a, c);
  w[2] = _mm512_unpacklo_epi64(b, d);
  w[3] = _mm512_unpackhi_epi64(b, d);
}
// Bits 0..3 as bit 4 of the four bytes.
OCTAVO_INLINE Words spread_bits(Words v) {
  const Words spread = _mm512_setr_epi32(
      0, 0x10, 0x1000, 0x1010, 0x100000, 0x100010, 0x101000, 0x101010, 0x10000000, 0x10000010,
      0x10001000, 0x10001010, 0x10100000, 0x10100010, 0x10101000, 0x10101010);
  return _mm512_permutexvar_epi32(v, spread);
}

// The instruction multiplies unsigned codes with signed numbers: signed codes are moved up.
OCTAVO_INLINE Words ready(Words codes) { return codes ^ words(0x80808080); }
template <class Shape>
constexpr int bias_of() {
  return Shape::kBits == 8 ? 128 : Shape::kBias;
}
template <class Shape>
constexpr int words_at_once() {
  return 1;
}
template <int kBits, int kWords>
OCTAVO_INLINE Words dot(Words acc, const Words* codes, const int8_t* numbers) {
#pragma GCC unroll 8
  for (int j = 0; j < kWords; ++j) {
    int four;
    std::memcpy(&four, numbers + 4 * j, 4);
    acc = _mm512_dpbusd_epi32(acc, codes[j], words(four));
  }
  return acc;
}

}  // namespace OCTAVO_ISA
}  // namespace octavo

#include "int8_tiles.h"

namespace octavo {

void int8_product_avx512(const Rows& x, int64_t tokens, const Matrix& w, int64_t first,
                         int64_t count, float* out, int64_t out_stride, Scratch& scratch) {
  int8_product(x, tokens, w, first, count, out, out_stride, scratch);
}

}  // namespace octavo
