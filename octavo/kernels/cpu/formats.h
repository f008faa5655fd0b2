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

// 32 bytes or 2 x 16 bytes, widened: v[i] = scale * q + offset.
inline void widen(__m128i low, __m128i high, Lanes scale, Lanes offset, Lanes v[4]) {
  const __m128i parts[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
  for (int i = 0; i < 4; ++i) {
    v[i] = fma(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(parts[i])), scale, offset);
  }
}
inline void widen_signed(__m128i low, __m128i high, Lanes scale, Lanes high_scale, Lanes v[4]) {
  const __m128i parts[4] = {low, _mm_srli_si128(low, 8), high, _mm_srli_si128(high, 8)};
  for (int i = 0; i < 4; ++i) {
    const Lanes q = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(parts[i]));
    v[i] = _mm256_mul_ps(q, i < 2 ? scale : high_scale);
  }
}
inline __m128i low_nibbles(__m128i v) { return _mm_and_si128(v, _mm_set1_epi8(15)); }
inline __m128i high_nibbles(__m128i v) { return low_nibbles(_mm_srli_epi16(v, 4)); }
// 16 where the bit of 16 consecutive bits is set, else 0.
inline __m128i fifth_bits(uint16_t bits) {
  const __m128i select = _mm_setr_epi8(1, 2, 4, 8, 16, 32, 64, -128, 1, 2, 4, 8, 16, 32, 64, -128);
  const __m128i spread = _mm_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m128i bytes = _mm_shuffle_epi8(_mm_set1_epi16(static_cast<short>(bits)), spread);
  const __m128i set = _mm_cmpeq_epi8(_mm_and_si128(bytes, select), select);
  return _mm_and_si128(set, _mm_set1_epi8(16));
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
    widen_signed(load16(p + 2), load16(p + 18), d, d, v);
  }
};
struct FormatQ4_0 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 18 * g;
    const float d = half_at(p);
    const __m128i q = load16(p + 2);
    widen(low_nibbles(q), high_nibbles(q), broadcast(d), broadcast(-8 * d), v);
  }
};
struct FormatQ4_1 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 20 * g;
    const __m128i q = load16(p + 4);
    const Lanes d = broadcast(half_at(p)), m = broadcast(half_at(p + 2));
    widen(low_nibbles(q), high_nibbles(q), d, m, v);
  }
};

inline void five_bits(const uint8_t* qh, const uint8_t* qs, Lanes scale, Lanes offset, Lanes v[4]) {
  uint16_t bits[2];
  std::memcpy(bits, qh, 4);
  const __m128i q = load16(qs);
  const __m128i low = _mm_or_si128(low_nibbles(q), fifth_bits(bits[0]));
  const __m128i high = _mm_or_si128(high_nibbles(q), fifth_bits(bits[1]));
  widen(low, high, scale, offset, v);
}
struct FormatQ5_0 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 22 * g;
    const float d = half_at(p);
    five_bits(p + 2, p + 6, broadcast(d), broadcast(-16 * d), v);
  }
};
struct FormatQ5_1 {
  static constexpr bool kBlocks = true;
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 24 * g;
    five_bits(p + 4, p + 8, broadcast(half_at(p)), broadcast(half_at(p + 2)), v);
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
    const __m128i a = load16(q), b = load16(q + 16);
    if (g % 2 == 0) {
      widen(low_nibbles(a), low_nibbles(b), scale, offset, v);
    } else {
      widen(high_nibbles(a), high_nibbles(b), scale, offset, v);
    }
  }
};
struct FormatQ5_K {
  static constexpr bool kBlocks = true;
  static __m128i fifth(const uint8_t* qh, int shift) {
    const __m128i moved = _mm_srl_epi16(load16(qh), _mm_cvtsi32_si128(shift));
    return _mm_slli_epi16(_mm_and_si128(moved, _mm_set1_epi8(1)), 4);
  }
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 176 * (g / 8);
    const int sub = static_cast<int>(g % 8);
    const uint8_t *qh = p + 16, *q = p + 48 + 32 * (sub / 2);
    Lanes scale, offset;
    k_scales(p, sub, scale, offset);
    __m128i a = load16(q), b = load16(q + 16);
    a = sub % 2 ? high_nibbles(a) : low_nibbles(a);
    b = sub % 2 ? high_nibbles(b) : low_nibbles(b);
    widen(_mm_or_si128(a, fifth(qh, sub)), _mm_or_si128(b, fifth(qh + 16, sub)), scale, offset, v);
  }
};
struct FormatQ6_K {
  static constexpr bool kBlocks = true;
  static __m128i high_bits(const uint8_t* qh, int shift) {
    const __m128i moved = _mm_srl_epi16(load16(qh), _mm_cvtsi32_si128(shift));
    return _mm_slli_epi16(_mm_and_si128(moved, _mm_set1_epi8(3)), 4);
  }
  static void group(const uint8_t* row, int64_t g, Lanes v[4]) {
    const uint8_t* p = row + 210 * (g / 8);
    const int half = static_cast<int>(g % 8 / 4), sub = static_cast<int>(g % 4);
    const uint8_t *ql = p + 64 * half + 32 * (sub % 2), *qh = p + 128 + 32 * half;
    const int8_t* scales = reinterpret_cast<const int8_t*>(p + 192) + 8 * half + 2 * sub;
    const float d = half_at(p + 208);
    __m128i a = load16(ql), b = load16(ql + 16);
    a = sub >= 2 ? high_nibbles(a) : low_nibbles(a);
    b = sub >= 2 ? high_nibbles(b) : low_nibbles(b);
    const __m128i offset = _mm_set1_epi8(32);
    a = _mm_sub_epi8(_mm_or_si128(a, high_bits(qh, 2 * sub)), offset);
    b = _mm_sub_epi8(_mm_or_si128(b, high_bits(qh + 16, 2 * sub)), offset);
    widen_signed(a, b, broadcast(d * scales[0]), broadcast(d * scales[1]), v);
  }
};

// 32 elements of any format.
template <class F>
inline void group_of(const uint8_t* row, int64_t g, Lanes v[4]) {
  if constexpr (F::kBlocks) {
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
  }
}

}  // namespace octavo
