// How the other weight formats become float32: gguf's smaller ones, and what published checkpoints
// become in memory (octavo/formats.py). As formats.h: 32 elements of a row at a time, the same values
// bit by bit as the reference. Formats with a table read what their scales mean from it.
#pragma once

#include <type_traits>

#include "formats.h"
#include "grid_formats.h"

namespace octavo {
inline namespace OCTAVO_ISA {

inline float bfloat_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}
inline float float_at(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return value;
}

// 16 signed bytes, one for each value of a nibble.
inline __m128i iq4_values() {
  return _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
}
inline __m128i twice_e2m1() {
  return _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
}
inline Lanes looked_up(__m128i values, __m128i codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(values, codes)));
}
inline __m128i low_nibbles(__m128i bytes) { return _mm_and_si128(bytes, _mm_set1_epi8(15)); }
inline __m128i high_nibbles(__m128i bytes) {
  return _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
}
// v = values[nibble] * scale; 16 bytes as in `nibbles`.
inline void values_of_nibbles(const uint8_t* p, __m128i values, Lanes scale, Lanes v[4]) {
  const __m128i bytes = load16(p), low = low_nibbles(bytes), high = high_nibbles(bytes);
  v[0] = _mm256_mul_ps(looked_up(values, low), scale);
  v[1] = _mm256_mul_ps(looked_up(values, _mm_srli_si128(low, 8)), scale);
  v[2] = _mm256_mul_ps(looked_up(values, high), scale);
  v[3] = _mm256_mul_ps(looked_up(values, _mm_srli_si128(high, 8)), scale);
}

struct FormatQ2_K {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 84 * (g / 8);
    const int half = static_cast<int>(g % 8 / 4), sub = static_cast<int>(g % 4);
    const uint8_t *scales = p + 8 * half + 2 * sub, *q = p + 16 + 32 * half;
    const float d = half_at(p + 80), minimum = half_at(p + 82);
    const __m128i shift = _mm_cvtsi32_si128(2 * sub);
    for (int i = 0; i < 4; ++i) {
      const Ints moved = _mm256_srl_epi32(bytes8(q + 8 * i), shift);
      const int both = scales[i / 2];
      const Lanes scale = broadcast(d * static_cast<float>(both & 15));
      const Lanes offset = broadcast(-(minimum * static_cast<float>(both >> 4)));
      v[i] = scaled(_mm256_and_si256(moved, _mm256_set1_epi32(3)), scale, offset);
    }
  }
};
struct FormatQ3_K {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 110 * (g / 8);
    const int half = static_cast<int>(g % 8 / 4), sub = static_cast<int>(g % 4);
    const uint8_t *q = p + 32 + 32 * half, *packed = p + 96;
    const float d = half_at(p + 108);
    const __m128i shift = _mm_cvtsi32_si128(2 * sub), bit = _mm_cvtsi32_si128(4 * half + sub);
    const Ints three = _mm256_set1_epi32(3), one = _mm256_set1_epi32(1);
    for (int i = 0; i < 4; ++i) {
      const int s = 8 * half + 2 * sub + i / 2;
      const int four = s < 8 ? packed[s] & 15 : packed[s - 8] >> 4;
      const int two = packed[8 + s % 4] >> 2 * (s / 4) & 3;
      const float scale = d * static_cast<float>((four | two << 4) - 32);
      const Ints low = _mm256_and_si256(_mm256_srl_epi32(bytes8(q + 8 * i), shift), three);
      const Ints high = _mm256_and_si256(_mm256_srl_epi32(bytes8(p + 8 * i), bit), one);
      const Ints code = _mm256_sub_epi32(_mm256_or_si256(low, _mm256_slli_epi32(high, 2)),
                                         _mm256_set1_epi32(4));
      v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(code), broadcast(scale));
    }
  }
};
struct FormatIQ4_NL {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 18 * g;
    values_of_nibbles(p + 2, iq4_values(), broadcast(half_at(p)), v);
  }
};
struct FormatIQ4_XS {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 136 * (g / 8);
    const int sub = static_cast<int>(g % 8);
    const int high = (p[2] | p[3] << 8) >> 2 * sub & 3, low = p[4 + sub / 2] >> 4 * (sub % 2) & 15;
    const float scale = half_at(p) * static_cast<float>((low | high << 4) - 32);
    values_of_nibbles(p + 8 + 16 * sub, iq4_values(), broadcast(scale), v);
  }
};
struct FormatMXFP4 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 17 * g;
    // Half of 2^(exponent - 127), since the table has twice the values.
    const uint32_t bits = p[0] < 2 ? 0x00200000u << p[0] : (p[0] - 1u) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    values_of_nibbles(p + 1, twice_e2m1(), broadcast(scale), v);
  }
};
struct FormatNVFP4 {
  static constexpr bool kBlocks = true, kTable = true;
  static void group(const uint8_t* row, int64_t g, const float* table, Lanes v[4]) {
    const uint8_t* p = row + 36 * (g / 2);
    const __m128i bytes = load16(p + 4 + 16 * (g % 2));
    const __m128i low = low_nibbles(bytes), high = high_nibbles(bytes);
    for (int i = 0; i < 2; ++i) {  // a scale's 16 elements: low nibbles of 8 bytes, then high
      const Lanes scale = broadcast(table[p[2 * (g % 2) + i]]);
      const __m128i one = i ? _mm_srli_si128(low, 8) : low, two = i ? _mm_srli_si128(high, 8) : high;
      v[2 * i] = _mm256_mul_ps(looked_up(twice_e2m1(), one), scale);
      v[2 * i + 1] = _mm256_mul_ps(looked_up(twice_e2m1(), two), scale);
    }
  }
};

// (code - zero) * scale, exact for 16-bit scales: one scale and zero for kGroup elements.
struct ScaleF16 {
  static float at(const uint8_t* p) { return half_at(p); }
};
struct ScaleBF16 {
  static float at(const uint8_t* p) { return bfloat_at(p); }
};
template <class Scale, int kGroup>
struct FormatInt4 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    constexpr int64_t kGroups = kGroup / 32;
    const uint8_t* p = row + (3 + kGroup / 2) * (g / kGroups);
    const float scale = Scale::at(p);
    const float offset = -(static_cast<float>(p[2]) * scale);
    nibbles(p + 3 + 16 * (g % kGroups), broadcast(scale), broadcast(offset), v);
  }
};
template <int kGroup>
struct FormatInt8 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    constexpr int64_t kGroups = kGroup / 32;
    const uint8_t *p = row + (5 + kGroup) * (g / kGroups), *q = p + 5 + 32 * (g % kGroups);
    const Lanes scale = broadcast(float_at(p));
    const Ints zero = _mm256_set1_epi32(p[4]);
    for (int i = 0; i < 4; ++i) {
      const Ints code = _mm256_sub_epi32(bytes8(q + 8 * i), zero);
      v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(code), scale);
    }
  }
};
struct FormatFP8 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t *p = row + 132 * (g / 4), *q = p + 4 + 32 * (g % 4);
    const Lanes scale = broadcast(float_at(p)), rebias = broadcast(0x1p120f);
    for (int i = 0; i < 4; ++i) {
      // e4m3's exponent and mantissa under float32's: too small by 2^120, subnormals included.
      const Ints code = bytes8(q + 8 * i);
      const Ints sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
      const Ints size = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x7f)), 20);
      const Lanes number = _mm256_castsi256_ps(_mm256_or_si256(sign, size));
      v[i] = _mm256_mul_ps(_mm256_mul_ps(number, rebias), scale);
    }
  }
};

template <class F, class = void>
struct HasTable : std::false_type {};
template <class F>
struct HasTable<F, std::enable_if_t<F::kTable>> : std::true_type {};

// What a row keeps from group to group: the scales of a block of several.
struct Stateless {};
template <class F, class = void>
struct StateOf {
  using Type = Stateless;
};
template <class F>
struct StateOf<F, std::void_t<typename F::State>> {
  using Type = typename F::State;
};

// 32 elements of any format; a row's groups are asked for in order, from the first on.
template <class F>
inline void group_of(const uint8_t* row, int64_t g, const float* table,
                     typename StateOf<F>::Type& state, Lanes v[4]) {
  if constexpr (!std::is_same_v<typename StateOf<F>::Type, Stateless>) {
    if (g % 8 == 0) F::enter(row, g, state);
    F::group(row, g, state, v);
  } else if constexpr (HasTable<F>::value) {
    F::group(row, g, table, v);
  } else if constexpr (F::kBlocks) {
    F::group(row, g, v);
  } else {
    for (int i = 0; i < 4; ++i) v[i] = F::eight(row, 32 * g + 8 * i);
  }
}

// Calls use(F{}) with the type of `format`.
template <class Use>
inline void with_format(int64_t format, const Use& use) {
  switch (format) {
    case F32: return use(FormatF32{});
    case F16: return use(FormatF16{});
    case BF16: return use(FormatBF16{});
    case Q8_0: return use(FormatQ8_0{});
    case Q4_0: return use(FormatQ4_0{});
    case Q4_1: return use(FormatQ4_1{});
    case Q5_0: return use(FormatQ5_0{});
    case Q5_1: return use(FormatQ5_1{});
    case Q4_K: return use(FormatQ4_K{});
    case Q5_K: return use(FormatQ5_K{});
    case Q6_K: return use(FormatQ6_K{});
    case Q2_K: return use(FormatQ2_K{});
    case Q3_K: return use(FormatQ3_K{});
    case IQ4_NL: return use(FormatIQ4_NL{});
    case IQ4_XS: return use(FormatIQ4_XS{});
    case MXFP4: return use(FormatMXFP4{});
    case NVFP4: return use(FormatNVFP4{});
    case IQ2_XXS: return use(FormatIQ2_XXS{});
    case IQ2_XS: return use(FormatIQ2_XS{});
    case IQ2_S: return use(FormatIQ2_S{});
    case IQ3_XXS: return use(FormatIQ3_XXS{});
    case IQ3_S: return use(FormatIQ3_S{});
    case IQ1_S: return use(FormatIQ1_S{});
    case IQ1_M: return use(FormatIQ1_M{});
    case TQ1_0: return use(FormatTQ1_0{});
    case TQ2_0: return use(FormatTQ2_0{});
    case INT4_32_F16: return use(FormatInt4<ScaleF16, 32>{});
    case INT4_32_BF16: return use(FormatInt4<ScaleBF16, 32>{});
    case INT4_64_F16: return use(FormatInt4<ScaleF16, 64>{});
    case INT4_64_BF16: return use(FormatInt4<ScaleBF16, 64>{});
    case INT4_128_F16: return use(FormatInt4<ScaleF16, 128>{});
    case INT4_128_BF16: return use(FormatInt4<ScaleBF16, 128>{});
    case INT8_32: return use(FormatInt8<32>{});
    case INT8_64: return use(FormatInt8<64>{});
    case INT8_128: return use(FormatInt8<128>{});
    case FP8: return use(FormatFP8{});
  }
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
