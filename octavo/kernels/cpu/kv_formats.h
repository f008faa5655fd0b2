// Formats of the KV cache: numbers and scales of a vector (a head's key or value of one token), as
// kernels/kv_codec.py specifies them. A number times its scale is exact in float32, in all of them.
#pragma once

#include <algorithm>

#include "formats.h"

namespace octavo {

constexpr int64_t kScaled = 32, kPacked = 64;  // numbers of int4: with one scale, in one block
constexpr int64_t kMaxMixed = 128;             // numbers of a Hadamard matrix
constexpr float kLeastAlong = 1e-30f;          // see kv_codec.LEAST_ALONG

inline bool is_quantized(int64_t format) { return format >= KV_FP8; }
inline bool mixes_keys(int64_t format, bool is_balanced) {
  return format == KV_INT8 || format == KV_INT4 || (format == KV_FP8 && is_balanced);
}
inline int64_t number_bytes(int64_t format, int64_t size) {
  switch (format) {
    case KV_F32: return 4 * size;
    case KV_F16:
    case KV_BF16: return 2 * size;
    case KV_INT4: return size / 2;
    default: return size;
  }
}
inline float scale_at(const uint8_t* scales, int64_t index) {
  uint16_t bits;
  std::memcpy(&bits, scales + 2 * index, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Numbers of fp8 lie in float16 as they are, but for the exponent's bias: kFactor.
struct FormatFP8 {
  static constexpr float kFactor = 256.0f;
  static Lanes widen(__m128i bytes) {
    const __m128i wide = _mm_cvtepu8_epi16(bytes);
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(wide, _mm_set1_epi16(0x7f)), 7);
    return _mm256_cvtph_ps(_mm_or_si128(sign, rest));
  }
  static Lanes eight(const uint8_t* row, int64_t k) { return widen(load8(row + k)); }
  static Lanes some(const uint8_t* row, int64_t k, int64_t count) {
    uint8_t padded[8] = {};
    std::memcpy(padded, row + k, count);
    return widen(load8(padded));
  }
};
struct FormatInt8 {
  static constexpr float kFactor = 1.0f;
  static Lanes eight(const uint8_t* row, int64_t k) {
    return _mm256_cvtepi32_ps(signed8(row + k));
  }
  static Lanes some(const uint8_t* row, int64_t k, int64_t count) {
    uint8_t padded[8] = {};
    std::memcpy(padded, row + k, count);
    return eight(padded, 0);
  }
};

// A vector of int4 as float32.
inline void expand_int4(const uint8_t* numbers, const uint8_t* scales, int64_t size, float* to) {
  const Lanes middle = broadcast(7.5f);
  for (int64_t b = 0; b < size / kPacked; ++b, numbers += kPacked / 2, to += kPacked) {
    const Lanes low = broadcast(scale_at(scales, 2 * b));
    const Lanes high = broadcast(scale_at(scales, 2 * b + 1));
    for (int64_t k = 0; k < kScaled; k += 8) {
      const Ints both = bytes8(numbers + k);
      const Lanes first = _mm256_sub_ps(_mm256_cvtepi32_ps(low_nibble(both)), middle);
      const Lanes second = _mm256_sub_ps(_mm256_cvtepi32_ps(high_nibble(both)), middle);
      store(to + k, _mm256_mul_ps(first, low));
      store(to + kScaled + k, _mm256_mul_ps(second, high));
    }
  }
}
// `size` numbers of F that share a scale, as float32.
template <class F>
inline void expand_scaled(const uint8_t* numbers, float scale, int64_t size, float* to) {
  const Lanes factor = broadcast(scale * F::kFactor);
  int64_t k = 0;
  for (; k + 8 <= size; k += 8) store(to + k, _mm256_mul_ps(F::eight(numbers, k), factor));
  if (k < size) store_some(to + k, size - k, _mm256_mul_ps(F::some(numbers, k, size - k), factor));
}

// x times a Hadamard matrix over sqrt(n), n = the largest power of two that divides `size`, up to
// kMaxMixed, n numbers at a time. The same order of additions as kv_codec.mix.
inline void mix(float* x, int64_t size) {
  const int64_t n = std::min(size & -size, kMaxMixed);
  for (int64_t half = 1; half < n; half *= 2) {
    for (int64_t i = 0; i < size; i += 2 * half) {
      for (int64_t j = i; j < i + half; ++j) {
        const float low = x[j], high = x[j + half];
        x[j] = low + high;
        x[j + half] = low - high;
      }
    }
  }
  const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(n)));
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}

// The largest |x|, or NaN where a number is not finite.
inline float largest_of(const float* x, int64_t size) {
  const Lanes sign = broadcast(-0.0f);
  Lanes largest = zeros(), spoilt = zeros();
  for (int64_t k = 0; k < size; k += 8) {
    const Lanes v = size - k >= 8 ? load(x + k) : load_some(x + k, size - k);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, v));
    spoilt = fma(v, zeros(), spoilt);  // NaN from the first NaN or infinity on
  }
  return max_lane(largest) + sum(spoilt);
}
// Writes a scale in bfloat16 and returns what was written.
inline float write_scale(float scale, uint8_t* to) {
  const __m128i narrow = to_bf16(broadcast(scale));
  std::memcpy(to, &narrow, 2);
  return scale_at(to, 0);
}

inline __m128i fp8_codes(Lanes steps) {
  const __m256i bits = _mm256_castps_si256(steps);
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  const __m256i plain = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(plain, 20), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(plain, half), 20);
  const __m256i normal = _mm256_sub_epi32(rounded, _mm256_set1_epi32((127 - 7) << 3));
  const Lanes magnitude = _mm256_castsi256_ps(plain);
  const __m256i small = _mm256_cvtps_epi32(_mm256_mul_ps(magnitude, broadcast(512.0f)));
  const Lanes is_small = _mm256_cmp_ps(magnitude, broadcast(0.015625f), _CMP_LT_OQ);
  const __m256i code = _mm256_or_si256(
      sign, _mm256_blendv_epi8(normal, small, _mm256_castps_si256(is_small)));
  const __m256i words = _mm256_packus_epi32(code, code);
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m256i order = _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0);
  return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order));
}
inline __m128i int_codes(Lanes steps, float low, float high) {
  const Lanes clamped = _mm256_min_ps(broadcast(high), _mm256_max_ps(broadcast(low), steps));
  const __m256i wide = _mm256_cvtps_epi32(clamped), words = _mm256_packs_epi32(wide, wide);
  const __m256i bytes = _mm256_packs_epi16(words, words);
  const __m256i order = _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0);
  return _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order));
}
// Writes x / scale as numbers of `format`, a byte each.
inline void write_numbers(int64_t format, const float* x, int64_t size, float scale, uint8_t* to) {
  const bool is_void = !(scale != 0.0f && scale - scale == 0.0f);
  const Lanes divisor = broadcast(is_void ? 1.0f : scale);
  for (int64_t k = 0; k < size; k += 8) {
    const int64_t count = std::min<int64_t>(8, size - k);
    const Lanes v = is_void ? zeros() : count == 8 ? load(x + k) : load_some(x + k, count);
    const Lanes steps = _mm256_div_ps(v, divisor);
    __m128i codes;
    if (format == KV_FP8) {
      codes = fp8_codes(_mm256_min_ps(broadcast(448.0f), _mm256_max_ps(broadcast(-448.0f), steps)));
    } else if (format == KV_INT8) {
      codes = int_codes(steps, -127.0f, 127.0f);
    } else {
      codes = int_codes(_mm256_add_ps(steps, broadcast(7.5f)), 0.0f, 15.0f);
    }
    std::memcpy(to + k, &codes, count);
  }
}

// One scale, `given` or of the numbers, and the numbers.
inline void quantize(int64_t format, const float* x, int64_t size, const float* given,
                     uint8_t* numbers, uint8_t* scales) {
  const float steps = format == KV_FP8 ? 448.0f : format == KV_INT8 ? 127.0f : 7.5f;
  const float largest = largest_of(x, size);
  const float scale = given != nullptr && largest == largest ? *given : largest / steps;
  write_numbers(format, x, size, write_scale(scale, scales), numbers);
}

// The dot product of `size` numbers with what was stored of them.
inline float along(const float* x, const uint8_t* codes, int64_t size, float scale) {
  Lanes total = zeros();
  for (int64_t k = 0; k < size; k += 8) {
    const Lanes steps = _mm256_sub_ps(_mm256_cvtepi32_ps(bytes8(codes + k)), broadcast(7.5f));
    total = fma(load(x + k), _mm256_mul_ps(steps, broadcast(scale)), total);
  }
  return sum(total);
}
inline float square(const float* x, int64_t size) {
  Lanes total = zeros();
  for (int64_t k = 0; k < size; k += 8) total = fma(load(x + k), load(x + k), total);
  return sum(total);
}

// Writes a mixed vector of int4, and then its scales once more: times what makes of it a vector that
// is as long along x as x is.
inline void write_int4(const float* x, int64_t size, uint8_t* numbers, uint8_t* scales) {
  float stored = 0.0f;
  for (int64_t b = 0; b < size / kPacked; ++b, numbers += kPacked / 2) {
    uint8_t codes[kPacked];
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t group = 2 * b + half;
      const float* from = x + group * kScaled;
      uint8_t* to = codes + half * kScaled;
      quantize(KV_INT4, from, kScaled, nullptr, to, scales + 2 * group);
      stored += along(from, to, kScaled, scale_at(scales, group));
    }
    for (int64_t i = 0; i < kPacked / 2; ++i) numbers[i] = codes[i] | codes[kPacked / 2 + i] << 4;
  }
  const float whole = square(x, size), infinity = std::numeric_limits<float>::infinity();
  if (!(stored > kLeastAlong && stored + whole < infinity)) return;
  const float factor = whole / stored;
  for (int64_t group = 0; group < size / kScaled; ++group) {
    write_scale(scale_at(scales, group) * factor, scales + 2 * group);
  }
}

// Writes a vector in a quantised format; x of int4 was mixed.
inline void write_vector(int64_t format, const float* x, int64_t size, const float* given,
                         uint8_t* numbers, uint8_t* scales) {
  if (format == KV_INT4) return write_int4(x, size, numbers, scales);
  quantize(format, x, size, given, numbers, scales);
}

}  // namespace octavo
