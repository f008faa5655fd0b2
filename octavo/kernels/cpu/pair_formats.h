// Weight formats in AVX-512: 32 consecutive elements of two rows at a time, eight of each in a
// register, as float32 and with the values of formats.h. A format makes 64 bytes of codes, those of
// row a before those of row b; what widens them is the same for all.
#pragma once

#include "packed_formats.h"

namespace octavo {
inline namespace OCTAVO_ISA {

using Wide = __m512;    // eight lanes of row a, then eight of row b
using Codes = __m512i;  // 32 bytes of row a, then 32 of row b

constexpr __mmask16 kRowB = 0xff00;

OCTAVO_INLINE Wide wide(float v) { return _mm512_set1_ps(v); }
OCTAVO_INLINE Wide wide(const float* a, const float* b) {
  return _mm512_mask_broadcastss_ps(wide(*a), kRowB, _mm_load_ss(b));
}
OCTAVO_INLINE Codes codes32(const uint8_t* a, const uint8_t* b) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(load32(a)), load32(b), 1);
}
OCTAVO_INLINE Codes all_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
// 16 bytes of each row, whose low nibbles are elements 0..15 and whose high ones the others; what
// else is in a byte stays there.
OCTAVO_INLINE Codes nibbles16(const uint8_t* a, const uint8_t* b) {
  const Codes twice_a = _mm512_broadcast_i32x4(load16(a));
  const Codes both = _mm512_mask_broadcast_i32x4(twice_a, kRowB, load16(b));
  return _mm512_srlv_epi64(both, _mm512_setr_epi64(0, 0, 4, 4, 0, 0, 4, 4));
}
OCTAVO_INLINE Codes low_nibbles(Codes v) { return _mm512_and_si512(v, all_bytes(15)); }
// Bytes 8i..8i+7 of either row, each `shift` bits up in four bytes, of which those in `kept` are
// not zeroed.
template <int shift, __mmask64 kept>
OCTAVO_INLINE Codes spread(Codes codes, int i) {
  const int a = 8 * i, b = 32 + 8 * i;
  const Codes first = _mm512_setr_epi32(a, a + 1, a + 2, a + 3, a + 4, a + 5, a + 6, a + 7, b,
                                        b + 1, b + 2, b + 3, b + 4, b + 5, b + 6, b + 7);
  return _mm512_maskz_permutexvar_epi8(kept, _mm512_slli_epi32(first, shift), codes);
}
constexpr __mmask64 kAll = ~static_cast<__mmask64>(0), kFirst = 0x1111111111111111;
OCTAVO_INLINE Wide unsigned_at(Codes codes, int i) {
  return _mm512_cvtepi32_ps(spread<0, kFirst>(codes, i));
}
// v = code * scale of signed codes. `scale` is 2^-24 of the scale, since codes are widened to the
// top of an int32: exact, as the product of the two powers is.
constexpr float kTop = 0x1p-24f;
OCTAVO_INLINE void signed_values(Codes codes, const Wide scale[2], Wide v[4]) {
  for (int i = 0; i < 4; ++i) {
    const Codes top = spread<24, 0x8888888888888888>(codes, i);
    v[i] = _mm512_mul_ps(_mm512_cvtepi32_ps(top), scale[i / 2]);
  }
}
// The float16 numbers at a and b.
OCTAVO_INLINE Wide halves(const uint8_t* a, const uint8_t* b) {
  int16_t of_a, of_b;
  std::memcpy(&of_a, a, 2);
  std::memcpy(&of_b, b, 2);
  return _mm512_cvtph_ps(_mm256_set_m128i(_mm_set1_epi16(of_b), _mm_set1_epi16(of_a)));
}

// Neighbours added within each quarter of a register: those of a, then those of b.
OCTAVO_INLINE Wide neighbours(Wide a, Wide b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}
// Writes the sums of M tokens' N pairs of rows, of which there are `rows`, by the tree of product.h.
template <int M, int N>
OCTAVO_INLINE void finish_pairs(const Wide (&acc)[M][N], int64_t rows, float* out,
                                int64_t out_stride) {
  const Codes order = _mm512_setr_epi32(0, 8, 1, 9, 2, 10, 3, 11, 0, 0, 0, 0, 0, 0, 0, 0);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n += 4) {
      const auto at = [&](int i) { return acc[m][n + i < N ? n + i : n]; };
      const Wide v = neighbours(neighbours(at(0), at(1)), neighbours(at(2), at(3)));
      const Wide sums = _mm512_add_ps(v, _mm512_shuffle_f32x4(v, v, 0xb1));
      const int64_t left = rows - 2 * n;
      const __mmask16 kept = left >= 8 ? 0xff : static_cast<__mmask16>((1u << left) - 1);
      _mm512_mask_storeu_ps(out + m * out_stride + 2 * n, kept,
                            _mm512_permutexvar_ps(order, sums));
    }
  }
}

// The values that four bits mean in either row.
struct Tables {
  Wide a, b;
};
// q * scale + offset, rounded once.
OCTAVO_INLINE Wide table_of(Wide scale, Wide offset) {
  const Wide codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_fmadd_ps(codes, scale, offset);
}
// The low nibbles of `codes` looked up.
OCTAVO_INLINE void looked_up(Codes codes, const Tables& tables, Wide v[4]) {
  const Codes row_b = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi8(16), 1);
  const Codes index = _mm512_or_si512(low_nibbles(codes), row_b);
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_permutex2var_ps(tables.a, spread<0, kAll>(index, i), tables.b);
  }
}

struct NoState {};

struct PairBF16 {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State&,
                                  Wide v[4]) {
    a += 64 * g, b += 64 * g;
    // Number i of a and of b becomes the high half of a word.
    const Codes first = _mm512_setr_epi32(
        0x0100 << 16, 0x0302 << 16, 0x0504 << 16, 0x0706 << 16, 0x0908 << 16, 0x0b0a << 16,
        0x0d0c << 16, 0x0f0e << 16, 0x2120 << 16, 0x2322 << 16, 0x2524 << 16, 0x2726 << 16,
        0x2928 << 16, 0x2b2a << 16, 0x2d2c << 16, 0x2f2e << 16);
    const Codes second = _mm512_add_epi32(first, _mm512_set1_epi32(0x1010 << 16));
    for (int i = 0; i < 4; ++i) {
      const Codes both = codes32(a + 32 * (i / 2), b + 32 * (i / 2));
      v[i] = _mm512_castsi512_ps(
          _mm512_maskz_permutexvar_epi8(0xcccccccccccccccc, i % 2 ? second : first, both));
    }
  }
};
struct PairQ8_0 {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State&,
                                  Wide v[4]) {
    a += 34 * g, b += 34 * g;
    const Wide d = _mm512_mul_ps(halves(a, b), wide(kTop)), scale[2] = {d, d};
    signed_values(codes32(a + 2, b + 2), scale, v);
  }
};
struct PairQ4_0 {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State&,
                                  Wide v[4]) {
    a += 18 * g, b += 18 * g;
    const Wide d = _mm512_mul_ps(halves(a, b), wide(kTop)), scale[2] = {d, d};
    const Codes codes = low_nibbles(nibbles16(a + 2, b + 2));
    signed_values(_mm512_sub_epi8(codes, all_bytes(8)), scale, v);
  }
};
struct PairQ4_1 {
  using State = NoState;
  static OCTAVO_INLINE Wide table(const uint8_t* p) {
    int bits;
    std::memcpy(&bits, p, 4);
    const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
    return table_of(_mm512_broadcastss_ps(pair), _mm512_broadcastss_ps(_mm_movehdup_ps(pair)));
  }
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State&,
                                  Wide v[4]) {
    a += 20 * g, b += 20 * g;
    looked_up(nibbles16(a + 4, b + 4), {table(a), table(b)}, v);
  }
};
// Nibbles with a fifth bit each, bit i of the 32 at qh for element i.
OCTAVO_INLINE __mmask64 fifth_bits(const uint8_t* a, const uint8_t* b) {
  return word_at(a) | static_cast<uint64_t>(word_at(b)) << 32;
}
struct PairQ5_0 {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State&,
                                  Wide v[4]) {
    a += 22 * g, b += 22 * g;
    const Wide d = _mm512_mul_ps(halves(a, b), wide(kTop)), scale[2] = {d, d};
    const Codes codes = low_nibbles(nibbles16(a + 6, b + 6));
    const __mmask64 below = ~fifth_bits(a + 2, b + 2);
    signed_values(_mm512_mask_sub_epi8(codes, below, codes, all_bytes(16)), scale, v);
  }
};
struct PairQ4_K {
  struct State {
    GroupScales a, b;
  };
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State& of,
                                  Wide v[4]) {
    if (g % 8 == 0) {
      FormatQ4_K::enter(a, g, of.a);
      FormatQ4_K::enter(b, g, of.b);
    }
    const int64_t sub = g % 8, at = 144 * (g / 8) + 16 + 32 * (sub / 2);
    const Codes both = codes32(a + at, b + at);
    const Codes codes = sub % 2 ? _mm512_srli_epi16(both, 4) : both;
    looked_up(codes, {table_of(wide(of.a.scale[sub]), wide(of.a.offset[sub])),
                      table_of(wide(of.b.scale[sub]), wide(of.b.offset[sub]))}, v);
  }
};
struct PairQ5_K {
  struct State {
    GroupScales a, b;
  };
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State& of,
                                  Wide v[4]) {
    if (g % 8 == 0) {
      FormatQ5_K::enter(a, g, of.a);
      FormatQ5_K::enter(b, g, of.b);
    }
    const int64_t sub = g % 8, block = 176 * (g / 8), at = block + 48 + 32 * (sub / 2);
    const Codes both = codes32(a + at, b + at), bits = codes32(a + block + 16, b + block + 16);
    const __mmask64 fifth = _mm512_test_epi8_mask(bits, all_bytes(1 << sub));
    const Codes four = low_nibbles(sub % 2 ? _mm512_srli_epi16(both, 4) : both);
    const Codes codes = _mm512_mask_add_epi8(four, fifth, four, all_bytes(16));
    const Wide scale = wide(of.a.scale + sub, of.b.scale + sub);
    const Wide offset = wide(of.a.offset + sub, of.b.offset + sub);
    for (int i = 0; i < 4; ++i) v[i] = _mm512_fmadd_ps(unsigned_at(codes, i), scale, offset);
  }
};
struct PairQ6_K {
  struct State {
    FormatQ6_K::State a, b;
  };
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State& of,
                                  Wide v[4]) {
    if (g % 8 == 0) {
      FormatQ6_K::enter(a, g, of.a);
      FormatQ6_K::enter(b, g, of.b);
    }
    const int64_t block = 210 * (g / 8), half = g % 8 / 4, sub = g % 4, s = 2 * (g % 8);
    const int64_t low_at = block + 64 * half + 32 * (sub % 2), high_at = block + 128 + 32 * half;
    const Codes low = codes32(a + low_at, b + low_at), high = codes32(a + high_at, b + high_at);
    const Codes four = low_nibbles(_mm512_srl_epi16(low, _mm_cvtsi64_si128(sub / 2 * 4)));
    const Codes two = _mm512_srl_epi16(high, _mm_cvtsi64_si128(2 * sub));
    const Codes six = _mm512_or_si512(
        four, _mm512_and_si512(_mm512_slli_epi16(two, 4), all_bytes(0x30)));
    const Wide top = wide(kTop);
    const Wide scale[2] = {
        _mm512_mul_ps(wide(of.a.scale + s, of.b.scale + s), top),
        _mm512_mul_ps(wide(of.a.scale + s + 1, of.b.scale + s + 1), top)};
    signed_values(_mm512_sub_epi8(six, all_bytes(32)), scale, v);
  }
};
template <class Scale, int kGroup>
struct PairInt4 {
  using State = Tables;
  static OCTAVO_INLINE Wide table(const uint8_t* p) {
    const float scale = Scale::at(p);
    return table_of(wide(scale), wide(-(static_cast<float>(p[2]) * scale)));
  }
  static OCTAVO_INLINE void group(const uint8_t* a, const uint8_t* b, int64_t g, State& of,
                                  Wide v[4]) {
    constexpr int64_t kGroups = kGroup / 32;
    const int64_t block = (3 + kGroup / 2) * (g / kGroups), at = block + 3 + 16 * (g % kGroups);
    if (g % kGroups == 0) of = {table(a + block), table(b + block)};
    looked_up(nibbles16(a + at, b + at), of, v);
  }
};

// Calls use(P{}) with the type of w's format; returns whether there is one for rows like these.
template <class Use>
inline bool with_pair_format(const Matrix& w, const Use& use) {
  if (w.cols % 32 != 0) return false;
  switch (w.format) {
    case BF16: use(PairBF16{}); return true;
    case Q8_0: use(PairQ8_0{}); return true;
    case Q4_0: use(PairQ4_0{}); return true;
    case Q4_1: use(PairQ4_1{}); return true;
    case Q5_0: use(PairQ5_0{}); return true;
    case Q4_K: use(PairQ4_K{}); return true;
    case Q5_K: use(PairQ5_K{}); return true;
    case Q6_K: use(PairQ6_K{}); return true;
    case INT4_32_F16: use(PairInt4<ScaleF16, 32>{}); return true;
    case INT4_32_BF16: use(PairInt4<ScaleBF16, 32>{}); return true;
    case INT4_64_F16: use(PairInt4<ScaleF16, 64>{}); return true;
    case INT4_64_BF16: use(PairInt4<ScaleBF16, 64>{}); return true;
    case INT4_128_F16: use(PairInt4<ScaleF16, 128>{}); return true;
    case INT4_128_BF16: use(PairInt4<ScaleBF16, 128>{}); return true;
  }
  return false;
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
