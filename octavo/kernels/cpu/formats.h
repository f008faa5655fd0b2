// How each weight format becomes float32: 32 consecutive elements of a row at a time, the same
// values bit by bit as gguf's reference (every product of scales is exact in float32, so the one
// rounding of a fused multiply-add is that of the reference's last addition).
// Block layouts: ggml's ggml-common.h.
#pragma once

#include "native.h"
#include "simd.h"

namespace octavo {
inline namespace OCTAVO_ISA {

inline float half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return _cvtsh_ss(bits);
}
// Two float16 numbers side by side, each in all lanes.
inline void two_halves(const uint8_t* p, Lanes& first, Lanes& second) {
  int bits;
  std::memcpy(&bits, p, 4);
  const __m128 pair = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
  first = _mm256_broadcastss_ps(pair);
  second = _mm256_broadcastss_ps(_mm_movehdup_ps(pair));
}

using Ints = __m256i;  // eight int32

inline __m128i load8(const uint8_t* p) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
}
inline Ints bytes8(const uint8_t* p) { return _mm256_cvtepu8_epi32(load8(p)); }
inline Ints signed8(const uint8_t* p) { return _mm256_cvtepi8_epi32(load8(p)); }
inline Ints low_nibble(Ints v) { return _mm256_and_si256(v, _mm256_set1_epi32(15)); }
inline Ints high_nibble(Ints v) { return _mm256_srli_epi32(v, 4); }
inline Lanes scaled(Ints q, Lanes scale, Lanes offset) {
  return fma(_mm256_cvtepi32_ps(q), scale, offset);
}
// v = scale * q + offset; 16 bytes hold elements 0..15 in their low nibbles, 16..31 in the high.
inline void nibbles(const uint8_t* p, Lanes scale, Lanes offset, Lanes v[4]) {
  const Ints a = bytes8(p), b = bytes8(p + 8);
  v[0] = scaled(low_nibble(a), scale, offset);
  v[1] = scaled(low_nibble(b), scale, offset);
  v[2] = scaled(high_nibble(a), scale, offset);
  v[3] = scaled(high_nibble(b), scale, offset);
}
// 32 signed bytes, widened.
inline void widen(__m256i bytes, Ints q[4]) {
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  q[0] = _mm256_cvtepi8_epi32(low);
  q[1] = _mm256_cvtepi8_epi32(_mm_srli_si128(low, 8));
  q[2] = _mm256_cvtepi8_epi32(high);
  q[3] = _mm256_cvtepi8_epi32(_mm_srli_si128(high, 8));
}
inline __m256i load32(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline __m256i and_bytes(__m256i v, char mask) {
  return _mm256_and_si256(v, _mm256_set1_epi8(mask));
}
// The same with a fifth bit for each element, bit i of the 32 at `qh` for element i.
inline void nibbles_and_bits(const uint8_t* qh, const uint8_t* p, Lanes scale, Lanes offset,
                             Lanes v[4]) {
  int bits;
  std::memcpy(&bits, qh, 4);
  const __m128i packed = load16(p);
  const __m256i both = _mm256_set_m128i(_mm_srli_epi16(packed, 4), packed);
  // byte i of 32 gets the byte of the bits that has its own, then whether that is set
  const __m256i byte_of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                             0x0303030303030303);
  const __m256i bit_of = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), byte_of);
  const __m256i is_set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of), bit_of);
  Ints q[4];
  widen(_mm256_or_si256(and_bytes(both, 15), and_bytes(is_set, 16)), q);
  for (int i = 0; i < 4; ++i) v[i] = scaled(q[i], scale, offset);
}

// Number formats: `eight` and `some` (fewer than eight) serve columns beyond the last 32.
struct FormatF32 {
  static constexpr bool kBlocks = false;
  static Lanes eight(const uint8_t* row, int64_t k) {
    return load(reinterpret_cast<const float*>(row) + k);
  }
  static Lanes some(const uint8_t* row, int64_t k, int64_t count) {
    return load_some(reinterpret_cast<const float*>(row) + k, count);
  }
};

template <class Number>
struct Format16 {
  static constexpr bool kBlocks = false;
  static Lanes eight(const uint8_t* row, int64_t k) { return Number::widen(load16(row + 2 * k)); }
  static Lanes some(const uint8_t* row, int64_t k, int64_t count) {
    uint16_t padded[8] = {};
    std::memcpy(padded, row + 2 * k, 2 * count);
    return Number::widen(load16(padded));
  }
};
struct NumberF16 {
  static Lanes widen(__m128i v) { return _mm256_cvtph_ps(v); }
};
struct NumberBF16 {
  static Lanes widen(__m128i v) { return from_bf16(v); }
};
using FormatF16 = Format16<NumberF16>;
using FormatBF16 = Format16<NumberBF16>;

struct FormatQ8_0 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 34 * g;
    const Lanes d = broadcast(half_at(p));
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(signed8(p + 2 + 8 * i)), d);
    }
  }
};
struct FormatQ4_0 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 18 * g;
    const float d = half_at(p);
    nibbles(p + 2, broadcast(d), broadcast(-8 * d), v);
  }
};
struct FormatQ4_1 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 20 * g;
    Lanes d, m;
    two_halves(p, d, m);
    nibbles(p + 4, d, m, v);
  }
};
struct FormatQ5_0 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 22 * g;
    const float d = half_at(p);
    nibbles_and_bits(p + 2, p + 6, broadcast(d), broadcast(-16 * d), v);
  }
};
struct FormatQ5_1 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 24 * g;
    Lanes d, m;
    two_halves(p, d, m);
    nibbles_and_bits(p + 4, p + 8, d, m, v);
  }
};

// K formats: blocks of 256 in eight groups of 32. `enter` reads a block's scales, the groups use them.
struct GroupScales {
  float scale[8], offset[8];
};
inline Lanes eight_bytes(uint32_t first, uint32_t second) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(second) << 32 | first);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}
// 6-bit scales and minimums of eight groups, packed in 12 bytes.
inline void k_scales(const uint8_t* block, GroupScales& of) {
  uint32_t words[3];
  std::memcpy(words, block + 4, 12);
  const uint32_t low_scales = words[0] & 0x3f3f3f3f, low_minimums = words[1] & 0x3f3f3f3f;
  const uint32_t scales = (words[2] & 0x0f0f0f0f) | (words[0] >> 2 & 0x30303030);
  const uint32_t minimums = (words[2] >> 4 & 0x0f0f0f0f) | (words[1] >> 2 & 0x30303030);
  Lanes d, minimum;
  two_halves(block, d, minimum);
  store(of.scale, _mm256_mul_ps(eight_bytes(low_scales, scales), d));
  const Lanes taken = _mm256_mul_ps(eight_bytes(low_minimums, minimums), minimum);
  store(of.offset, _mm256_xor_ps(taken, broadcast(-0.0f)));
}
struct FormatQ4_K {
  static constexpr bool kBlocks = true;
  using State = GroupScales;
  static void enter(const uint8_t* row, int64_t g, State& of) { k_scales(row + 144 * (g / 8), of); }
  static void group(const uint8_t* row, int64_t g, const State& of, Lanes v[4]) {
    const uint8_t* q = row + 144 * (g / 8) + 16 + 32 * (g % 8 / 2);
    const Lanes scale = broadcast(of.scale[g % 8]), offset = broadcast(of.offset[g % 8]);
    if (g % 2) {
      for (int i = 0; i < 4; ++i) v[i] = scaled(high_nibble(bytes8(q + 8 * i)), scale, offset);
    } else {
      for (int i = 0; i < 4; ++i) v[i] = scaled(low_nibble(bytes8(q + 8 * i)), scale, offset);
    }
  }
};
struct FormatQ5_K {
  static constexpr bool kBlocks = true;
  using State = GroupScales;
  static void enter(const uint8_t* row, int64_t g, State& of) { k_scales(row + 176 * (g / 8), of); }
  static void group(const uint8_t* row, int64_t g, const State& of, Lanes v[4]) {
    const uint8_t* p = row + 176 * (g / 8);
    const int sub = static_cast<int>(g % 8);
    const __m128i shift = _mm_cvtsi32_si128(sub), half = _mm_cvtsi32_si128(4 * (sub % 2));
    const __m256i four = and_bytes(_mm256_srl_epi16(load32(p + 48 + 32 * (sub / 2)), half), 15);
    const __m256i fifth = and_bytes(_mm256_srl_epi16(load32(p + 16), shift), 1);
    Ints q[4];
    widen(_mm256_or_si256(four, _mm256_slli_epi16(fifth, 4)), q);
    const Lanes scale = broadcast(of.scale[sub]), offset = broadcast(of.offset[sub]);
    for (int i = 0; i < 4; ++i) v[i] = scaled(q[i], scale, offset);
  }
};
struct FormatQ6_K {
  static constexpr bool kBlocks = true;
  struct State {
    float scale[16];
  };
  static void enter(const uint8_t* row, int64_t g, State& of) {
    const uint8_t* p = row + 210 * (g / 8);
    const Lanes d = broadcast(half_at(p + 208));
    store(of.scale, _mm256_mul_ps(_mm256_cvtepi32_ps(signed8(p + 192)), d));
    store(of.scale + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(signed8(p + 200)), d));
  }
  static void group(const uint8_t* row, int64_t g, const State& of, Lanes v[4]) {
    const uint8_t* p = row + 210 * (g / 8);
    const int half = static_cast<int>(g % 8 / 4), sub = static_cast<int>(g % 4);
    const __m128i shift = _mm_cvtsi32_si128(2 * sub), nibble = _mm_cvtsi32_si128(sub / 2 * 4);
    const __m256i low = _mm256_srl_epi16(load32(p + 64 * half + 32 * (sub % 2)), nibble);
    const __m256i high = and_bytes(_mm256_srl_epi16(load32(p + 128 + 32 * half), shift), 3);
    const __m256i code = _mm256_or_si256(and_bytes(low, 15), _mm256_slli_epi16(high, 4));
    Ints q[4];
    widen(_mm256_sub_epi8(code, _mm256_set1_epi8(32)), q);
    for (int i = 0; i < 4; ++i) {
      const Lanes scale = broadcast(of.scale[2 * (g % 8) + i / 2]);
      v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(q[i]), scale);
    }
  }
};

}  // namespace OCTAVO_ISA
}  // namespace octavo
