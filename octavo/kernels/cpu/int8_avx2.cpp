// Integer products in AVX2: a word of eight rows in a register.
#include "int8.h"

#include <algorithm>
#include <cstring>

#define OCTAVO_LANES 8
#include "int8_words.h"

namespace octavo {
inline namespace OCTAVO_ISA {

constexpr int kTokens = 4;  // of a tile

// The float16 numbers in the low halves.
OCTAVO_INLINE Floats halves(Words v) {
  const Words low = v & words(0xffff), packed = _mm256_packus_epi32(low, low);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
}

// The word at `at` of each row.
OCTAVO_INLINE Words word(const uint8_t* at, int64_t stride) {
  return _mm256_i32gather_epi32(reinterpret_cast<const int*>(at), row_offsets(stride), 1);
}
// The four words from `at` on of each row.
OCTAVO_INLINE void words4(const uint8_t* at, int64_t stride, Words w[4]) {
  Words rows[4];  // i, i + 4
  for (int i = 0; i < 4; ++i) {
    const uint8_t* p = at + i * stride;
    rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load16(p)), load16(p + 4 * stride), 1);
  }
  const Words a = _mm256_unpacklo_epi32(rows[0], rows[1]);
  const Words b = _mm256_unpackhi_epi32(rows[0], rows[1]);
  const Words c = _mm256_unpacklo_epi32(rows[2], rows[3]);
  const Words d = _mm256_unpackhi_epi32(rows[2], rows[3]);
  w[0] = _mm256_unpacklo_epi64(a, c);
  w[1] = _mm256_unpackhi_epi64(a, c);
  w[2] = _mm256_unpacklo_epi64(b, d);
  w[3] = _mm256_unpackhi_epi64(b, d);
}
// Bits 0..3 as bit 4 of the four bytes.
OCTAVO_INLINE Words spread_bits(Words v) {
  const Words apart = _mm256_mullo_epi32(v & words(15), words(0x00204081));
  return left(apart & words(0x01010101), 4);
}

// Signed codes are multiplied by their size, with numbers that take their sign.
OCTAVO_INLINE Words ready(Words codes) { return codes; }
template <class Shape>
constexpr int bias_of() {
  return Shape::kBits == 8 ? 0 : Shape::kBias;
}
template <int kBits>
OCTAVO_INLINE Words pair_sums(Words codes, const int8_t* numbers) {
  int four;
  std::memcpy(&four, numbers, 4);
  const Words x = words(four);
  if (kBits < 8) return _mm256_maddubs_epi16(codes, x);
  return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
}
// So many sums of pairs fit in 16 bits: (2^bits - 1) * 127 * 2 each.
template <class Shape>
constexpr int words_at_once() {
  constexpr int kFit = Shape::kBits <= 4 ? 8 : Shape::kBits == 5 ? 4 : Shape::kBits == 6 ? 2 : 1;
  return std::min(kFit, 8 / Shape::kHalves);
}
template <int kBits, int kWords>
OCTAVO_INLINE Words dot(Words acc, const Words* codes, const int8_t* numbers) {
  Words sums = pair_sums<kBits>(codes[0], numbers);
#pragma GCC unroll 8
  for (int i = 1; i < kWords; ++i) {
    sums = _mm256_add_epi16(sums, pair_sums<kBits>(codes[i], numbers + 4 * i));
  }
  return _mm256_add_epi32(acc, _mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
}

}  // namespace OCTAVO_ISA
}  // namespace octavo

#include "int8_tiles.h"

namespace octavo {

void int8_product_avx2(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                       float* out, int64_t out_stride, Scratch& scratch) {
  int8_product(x, tokens, w, first, count, out, out_stride, scratch);
}

}  // namespace octavo
