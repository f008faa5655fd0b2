// Eight float32 lanes (AVX2, FMA, F16C). Every sum over lanes has one fixed tree, so that a result
// does not depend on the tile that computed it. Include after all standard headers: what follows
// is compiled for AVX2, or for what a file asks for that defines OCTAVO_ISA, in a namespace of that
// name, since the linker keeps one of functions of one name. abi.cpp makes sure that it only runs
// where the CPU has those instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <immintrin.h>

#ifndef OCTAVO_ISA
#define OCTAVO_ISA avx2
#pragma GCC target("avx2,fma,f16c")
#endif

// What a loop over rows calls once a group must not be a call.
#define OCTAVO_INLINE inline __attribute__((always_inline))

namespace octavo {
inline namespace OCTAVO_ISA {

using Lanes = __m256;

inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Lanes v) { _mm256_storeu_ps(p, v); }
inline Lanes broadcast(float v) { return _mm256_set1_ps(v); }
inline Lanes zeros() { return _mm256_setzero_ps(); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }

inline __m256i first_lanes(int64_t count) {
  const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), index);
}
// The first `count` lanes (below 8); the others are zero and their memory is not touched.
inline Lanes load_some(const float* p, int64_t count) {
  return _mm256_maskload_ps(p, first_lanes(count));
}
inline void store_some(float* p, int64_t count, Lanes v) {
  _mm256_maskstore_ps(p, first_lanes(count), v);
}

// Sums of the lanes of four vectors: ((0+1)+(2+3)) + ((4+5)+(6+7)) each.
inline __m128 sum4(Lanes a, Lanes b, Lanes c, Lanes d) {
  const Lanes t = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
}
inline float sum(Lanes a) { return _mm_cvtss_f32(sum4(a, a, a, a)); }

inline float max_lane(Lanes a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  m = _mm_max_ss(m, _mm_shuffle_ps(m, m, 1));
  return _mm_cvtss_f32(m);
}

// e^x to about 1 ulp (Cody-Waite reduction, degree-6 polynomial); 0 below -87.3, inf above 88.7.
constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kLeastExp = -87.33654f, kMostExp = 88.72283f;
constexpr float kExpTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                               4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
inline Lanes exp(Lanes x) {
  const Lanes log2e = broadcast(kLog2E);
  const Lanes ln2_high = broadcast(kLn2High), ln2_low = broadcast(kLn2Low);
  const Lanes low = broadcast(kLeastExp), high = broadcast(kMostExp);
  // A NaN passes through max and min as their second operand.
  const Lanes clamped = _mm256_min_ps(high, _mm256_max_ps(low, x));
  const Lanes n = _mm256_round_ps(_mm256_mul_ps(clamped, log2e), _MM_FROUND_TO_NEAREST_INT | 8);
  Lanes r = _mm256_fnmadd_ps(n, ln2_high, clamped);
  r = _mm256_fnmadd_ps(n, ln2_low, r);
  Lanes p = broadcast(kExpTerms[0]);
  for (int i = 1; i < 6; ++i) p = fma(p, r, broadcast(kExpTerms[i]));
  p = fma(_mm256_mul_ps(r, r), p, _mm256_add_ps(r, broadcast(1.0f)));
  // 2^n in two factors, since n reaches 128 where one exponent field does not.
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i first = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i rest = _mm256_add_epi32(_mm256_sub_epi32(whole, half), bias);
  const __m256i second = _mm256_slli_epi32(rest, 23);
  p = _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second));
  const Lanes inf = broadcast(std::numeric_limits<float>::infinity());
  p = _mm256_blendv_ps(p, inf, _mm256_cmp_ps(x, high, _CMP_GT_OQ));
  return _mm256_andnot_ps(_mm256_cmp_ps(x, low, _CMP_LT_OQ), p);
}
inline float exp1(float x) { return _mm256_cvtss_f32(exp(broadcast(x))); }

inline Lanes sigmoid(Lanes x) {
  const Lanes one = broadcast(1.0f);
  return _mm256_div_ps(one, _mm256_add_ps(one, exp(_mm256_sub_ps(zeros(), x))));
}

inline Lanes from_bf16(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
// Rounds to nearest even, as torch does; NaN becomes torch's 0x7fc0.
inline __m128i to_bf16(Lanes v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  __m256i high = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  high = _mm256_blendv_epi8(high, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

}  // namespace OCTAVO_ISA
}  // namespace octavo
