// Activations rounded to int8, and which formats are multiplied with them.
#include "int8.h"

#include <cmath>

#include "simd.h"

namespace octavo {

namespace {

// |x|'s bits, of which a NaN's are largest, then infinity's.
inline __m256i size_bits(Lanes v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}

inline float largest(const Lanes (&v)[4]) {
  const __m256i low = _mm256_max_epi32(size_bits(v[0]), size_bits(v[1]));
  const __m256i high = _mm256_max_epi32(size_bits(v[2]), size_bits(v[3]));
  const __m256i both = _mm256_max_epi32(low, high);
  __m128i most = _mm_max_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
  return _mm_cvtss_f32(_mm_castsi128_ps(most));
}

inline int32_t sum_of(__m256i v) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

void round_block(const float* x, Int8Block& to) {
  Lanes v[4];
  for (int i = 0; i < 4; ++i) v[i] = load(x + 8 * i);
  const float most = largest(v), inverse = 127.0f / most;
  // Of nothing but zeros (and what is too small to divide by) all numbers are 0.
  const Lanes factor = broadcast(std::isfinite(inverse) ? inverse : 0.0f);
  __m256i q[4];
  for (int i = 0; i < 4; ++i) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], factor));
  for (int i = 0; i < 2; ++i) to.sums[i] = sum_of(_mm256_add_epi32(q[2 * i], q[2 * i + 1]));
  const __m256i low = _mm256_packs_epi32(q[0], q[1]), high = _mm256_packs_epi32(q[2], q[3]);
  // Packing goes by halves of a register: words 0, 4, 1, 5, 2, 6, 3, 7 are those in order.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to.numbers), packed);
  to.scale = most / 127.0f;
  to.scaled_sum = to.scale * static_cast<float>(to.sums[0] + to.sums[1]);
}

}  // namespace

void round_row(const float* x, int64_t cols, Int8Block* to) {
  for (int64_t g = 0; g < cols / 32; ++g) round_block(x + 32 * g, to[g]);
}

bool has_int8_product(int64_t format) {
  switch (format) {
    case Q8_0: case Q4_0: case Q4_1: case Q5_0: case Q5_1: case Q4_K: case Q5_K: case Q6_K:
    case INT4_32_F16: case INT4_32_BF16: case INT4_64_F16: case INT4_64_BF16:
    case INT4_128_F16: case INT4_128_BF16: case INT8_32: case INT8_64: case INT8_128:
      return true;
    default: return false;
  }
}

}  // namespace octavo
