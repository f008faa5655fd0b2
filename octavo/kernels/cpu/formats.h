// How each weight format becomes float32: 32 consecutive elements of a row at a time, the same
// values bit by bit as gguf's reference (every product of scales is exact in float32, so the one
// rounding of a fused multiply-add is that of the reference's last addition).
// Block layouts: ggml's ggml-common.h.
#pragma once

#include "native.h"
#include "simd.h"

namespace octavo {

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
// The same with a fifth bit for each element, bit i of the 32 at `qh` for element i.
inline void nibbles_and_bits(const uint8_t* qh, const uint8_t* p, Lanes scale, Lanes offset,
                             Lanes v[4]) {
  int bits;
  std::memcpy(&bits, qh, 4);
  const Ints a = bytes8(p), b = bytes8(p + 8);
  const Ints q[4] = {low_nibble(a), low_nibble(b), high_nibble(a), high_nibble(b)};
  const Ints lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int i = 0; i < 4; ++i) {
    const Ints moved = _mm256_srlv_epi32(_mm256_set1_epi32(bits >> 8 * i), lane);
    const Ints fifth = _mm256_and_si256(_mm256_slli_epi32(moved, 4), _mm256_set1_epi32(16));
    v[i] = scaled(_mm256_or_si256(q[i], fifth), scale, offset);
  }
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

// K formats: blocks of 256 in eight groups of 32; 6-bit scales and minimums packed in 12 bytes.
inline void k_scales(const uint8_t* block, int64_t group, Lanes& scale, Lanes& offset) {
  const uint8_t* s = block + 4;
  int sc, m;
  if (group < 4) {
    sc = s[group] & 63;
    m = s[group + 4] & 63;
  } else {
    sc = (s[group + 4] & 15) | (s[group - 4] >> 6) << 4;
    m = (s[group + 4] >> 4) | (s[group] >> 6) << 4;
  }
  scale = broadcast(half_at(block) * static_cast<float>(sc));
  offset = broadcast(-(half_at(block + 2) * static_cast<float>(m)));
}
struct FormatQ4_K {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 144 * (g / 8);
    const uint8_t* q = p + 16 + 32 * (g % 8 / 2);
    Lanes scale, offset;
    k_scales(p, g % 8, scale, offset);
    for (int i = 0; i < 4; ++i) {
      const Ints both = bytes8(q + 8 * i);
      v[i] = scaled(g % 2 ? high_nibble(both) : low_nibble(both), scale, offset);
    }
  }
};
struct FormatQ5_K {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 176 * (g / 8);
    const int sub = static_cast<int>(g % 8);
    const uint8_t *qh = p + 16, *q = p + 48 + 32 * (sub / 2);
    const __m128i shift = _mm_cvtsi32_si128(sub);
    Lanes scale, offset;
    k_scales(p, sub, scale, offset);
    for (int i = 0; i < 4; ++i) {
      const Ints both = bytes8(q + 8 * i), moved = _mm256_srl_epi32(bytes8(qh + 8 * i), shift);
      const Ints fifth = _mm256_and_si256(_mm256_slli_epi32(moved, 4), _mm256_set1_epi32(16));
      const Ints four = sub % 2 ? high_nibble(both) : low_nibble(both);
      v[i] = scaled(_mm256_or_si256(four, fifth), scale, offset);
    }
  }
};
struct FormatQ6_K {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 210 * (g / 8);
    const int half = static_cast<int>(g % 8 / 4), sub = static_cast<int>(g % 4);
    const uint8_t *ql = p + 64 * half + 32 * (sub % 2), *qh = p + 128 + 32 * half;
    const int8_t* scales = reinterpret_cast<const int8_t*>(p + 192) + 8 * half + 2 * sub;
    const float d = half_at(p + 208);
    const __m128i shift = _mm_cvtsi32_si128(2 * sub);
    for (int i = 0; i < 4; ++i) {
      const float scale = d * static_cast<float>(scales[i / 2]);
      const Ints both = bytes8(ql + 8 * i), moved = _mm256_srl_epi32(bytes8(qh + 8 * i), shift);
      const Ints high = _mm256_slli_epi32(_mm256_and_si256(moved, _mm256_set1_epi32(3)), 4);
      const Ints four = sub >= 2 ? high_nibble(both) : low_nibble(both);
      const Ints q = _mm256_sub_epi32(_mm256_or_si256(four, high), _mm256_set1_epi32(32));
      v[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(q), broadcast(scale));
    }
  }
};

}  // namespace octavo
