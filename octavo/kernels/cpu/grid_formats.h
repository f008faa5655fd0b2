// ggml's formats whose codes point into a grid of vectors (IQ1 to IQ3), and its ternary ones: as
// formats.h, 32 elements of a row at a time. The grid comes with the matrix, as float32: it is a
// few dozen KiB, which the second cache keeps.
#pragma once

#include "formats.h"

namespace octavo {
inline namespace OCTAVO_ISA {

inline uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  std::memcpy(&word, p, 4);
  return word;
}
inline uint32_t short_at(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }

// v with the signs of the lanes whose bits are set turned round.
inline Lanes with_signs(Lanes v, uint32_t bits) {
  const Ints bit_of = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const Ints all = _mm256_set1_epi32(static_cast<int>(bits));
  const Ints is_set = _mm256_cmpeq_epi32(_mm256_and_si256(all, bit_of), bit_of);
  return _mm256_xor_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(is_set, 31)));
}
// Seven signs, and an eighth that makes their number even.
inline uint32_t even_signs(uint32_t seven) {
  seven &= 127;
  return seven | static_cast<uint32_t>(__builtin_parity(seven)) << 7;
}
inline Lanes grid8(const float* grid, uint32_t index, Lanes scale) {
  return _mm256_mul_ps(load(grid + 8 * index), scale);
}
inline Lanes two_grid4(const float* grid, uint32_t first, uint32_t second, Lanes scale) {
  const __m128 low = _mm_loadu_ps(grid + 4 * first), high = _mm_loadu_ps(grid + 4 * second);
  return _mm256_mul_ps(_mm256_set_m128(high, low), scale);
}
// d (half + scale) factor, exact in float32.
inline Lanes grid_scale(const uint8_t* block, uint32_t scale, float factor) {
  return broadcast(half_at(block) * (0.5f + static_cast<float>(scale)) * factor);
}

struct FormatIQ2_XXS {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 66 * (g / 8), *q = p + 2 + 8 * (g % 8);
    const uint32_t word = word_at(q + 4);
    const Lanes scale = grid_scale(p, word >> 28, 0.25f);
    for (int i = 0; i < 4; ++i) v[i] = with_signs(grid8(grid, q[i], scale), even_signs(word >> 7 * i));
  }
};
struct FormatIQ2_XS {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 74 * (g / 8), *q = p + 2 + 8 * (g % 8);
    const uint32_t scales = p[66 + g % 8];
    for (int i = 0; i < 4; ++i) {
      const uint32_t code = short_at(q + 2 * i);
      const Lanes scale = grid_scale(p, scales >> 4 * (i / 2) & 15, 0.25f);
      v[i] = with_signs(grid8(grid, code & 511, scale), even_signs(code >> 9));
    }
  }
};
struct FormatIQ2_S {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 82 * (g / 8), *q = p + 2 + 4 * (g % 8), *signs = q + 32;
    const uint32_t high = p[66 + g % 8], scales = p[74 + g % 8];
    for (int i = 0; i < 4; ++i) {
      const Lanes scale = grid_scale(p, scales >> 4 * (i / 2) & 15, 0.25f);
      v[i] = with_signs(grid8(grid, q[i] | (high >> 2 * i & 3) << 8, scale), signs[i]);
    }
  }
};
struct FormatIQ3_XXS {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 98 * (g / 8), *q = p + 2 + 8 * (g % 8);
    const uint32_t word = word_at(p + 66 + 4 * (g % 8));
    const Lanes scale = grid_scale(p, word >> 28, 0.5f);
    for (int i = 0; i < 4; ++i) {
      const Lanes values = two_grid4(grid, q[2 * i], q[2 * i + 1], scale);
      v[i] = with_signs(values, even_signs(word >> 7 * i));
    }
  }
};
struct FormatIQ3_S {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 110 * (g / 8), *q = p + 2 + 8 * (g % 8), *signs = p + 74 + 4 * (g % 8);
    const uint32_t high = p[66 + g % 8], scale = p[106 + g % 8 / 2] >> 4 * (g % 2) & 15;
    const Lanes by = broadcast(half_at(p) * static_cast<float>(1 + 2 * scale));
    for (int i = 0; i < 4; ++i) {
      const uint32_t first = q[2 * i] | (high >> 2 * i & 1) << 8;
      const uint32_t second = q[2 * i + 1] | (high >> (2 * i + 1) & 1) << 8;
      v[i] = with_signs(two_grid4(grid, first, second, by), signs[i]);
    }
  }
};

// (grid +- 1/8) scale, the sum exact.
inline Lanes moved_grid8(const float* grid, uint32_t index, bool is_below, float scale) {
  const Lanes moved = _mm256_add_ps(load(grid + 8 * index), broadcast(is_below ? -0.125f : 0.125f));
  return _mm256_mul_ps(moved, broadcast(scale));
}
struct FormatIQ1_S {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 50 * (g / 8), *q = p + 2 + 4 * (g % 8);
    const uint32_t high = short_at(p + 34 + 2 * (g % 8));
    const float scale = half_at(p) * static_cast<float>(2 * (high >> 12 & 7) + 1);
    for (int i = 0; i < 4; ++i) {
      v[i] = moved_grid8(grid, q[i] | (high >> 3 * i & 7) << 8, high & 0x8000, scale);
    }
  }
};
struct FormatIQ1_M {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* grid, Lanes v[4]) {
    const uint8_t *p = row + 56 * (g / 8), *q = p + 4 * (g % 8), *scales = p + 48;
    // The block's scale lies in the high four bits of the four words of scales.
    const uint32_t bits = scales[1] >> 4 | (scales[3] & 0xf0u) | (scales[5] & 0xf0u) << 4 |
                          (scales[7] & 0xf0u) << 8;
    const float d = _cvtsh_ss(static_cast<uint16_t>(bits));
    const uint32_t three = short_at(scales + 2 * (g % 8 / 2)) >> 6 * (g % 2);
    for (int i = 0; i < 4; ++i) {
      const uint32_t high = p[32 + (4 * (g % 8) + i) / 2] >> 4 * (i % 2) & 15;
      const float scale = d * static_cast<float>(2 * (three >> 3 * (i / 2) & 7) + 1);
      v[i] = moved_grid8(grid, q[i] | (high & 7) << 8, high & 8, scale);
    }
  }
};

struct FormatTQ1_0 {
  static constexpr bool kBlocks = true;
  // Five digits to the base of three in a byte, as a fraction: the next is what is above 1 of its
  // triple, once those before are shifted out.
  static void digits(const uint8_t* p, int count, int place, uint8_t* to) {
    static constexpr uint8_t kPowers[5] = {1, 3, 9, 27, 81};
    for (int i = 0; i < count; ++i) {
      const uint8_t rest = static_cast<uint8_t>(p[i] * kPowers[place]);
      to[i] = static_cast<uint8_t>((rest * 3) >> 8);
    }
  }
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 54 * (g / 8);
    const int sub = static_cast<int>(g % 8);
    alignas(32) uint8_t codes[32];
    if (sub < 5) {
      digits(p, 32, sub, codes);
    } else if (sub < 7) {
      for (int i = 0; i < 2; ++i) digits(p + 32, 16, 2 * (sub - 5) + i, codes + 16 * i);
    } else {
      digits(p + 32, 16, 4, codes);
      for (int i = 0; i < 4; ++i) digits(p + 48, 4, i, codes + 16 + 4 * i);
    }
    Ints q[4];
    widen(_mm256_sub_epi8(load32(codes), _mm256_set1_epi8(1)), q);
    const Lanes d = broadcast(half_at(p + 52));
    for (int i = 0; i < 4; ++i) v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(q[i]), d);
  }
};
struct FormatTQ2_0 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 66 * (g / 8);
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(2 * (g % 4)));
    const __m256i code = and_bytes(_mm256_srl_epi16(load32(p + 32 * (g % 8 / 4)), shift), 3);
    Ints q[4];
    widen(_mm256_sub_epi8(code, _mm256_set1_epi8(1)), q);
    const Lanes d = broadcast(half_at(p + 64));
    for (int i = 0; i < 4; ++i) v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(q[i]), d);
  }
};

}  // namespace OCTAVO_ISA
}  // namespace octavo
