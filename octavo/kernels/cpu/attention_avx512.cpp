// Tiles of attention in AVX-512: two keys lie side by side in a register, eight lanes each, so that
// every score has the order, and the bits, of tiles.h; values are weighed one by one.
#include "attention_wide.h"

#include <algorithm>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#define OCTAVO_ISA avx512
#include "simd.h"

namespace octavo {

namespace {

constexpr int kRows = 8, kPairs = kWideKeys / 2;  // queries of a tile, pairs of keys

inline Lanes low(__m512 v) { return _mm512_castps512_ps256(v); }
inline Lanes high(__m512 v) { return _mm512_extractf32x8_ps(v, 1); }
inline const float* numbers(const uint8_t* vector) {
  return reinterpret_cast<const float*>(vector);
}

// Sums of neighbours: of a in the first two places of every four, of b in the others.
inline __m512 pair_sums(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// Four queries' scores with four keys: the tree of sum4, for all of them at once.
inline void finish_four(const __m512 (*acc)[kPairs], float* out, int64_t out_stride) {
  __m512 fours[2];  // sums of four lanes: keys 0, 2 or 1, 3 of two queries, first halves and others
  for (int i = 0; i < 2; ++i) {
    const __m512 one = pair_sums(acc[2 * i][0], acc[2 * i][1]);
    const __m512 two = pair_sums(acc[2 * i + 1][0], acc[2 * i + 1][1]);
    fours[i] = pair_sums(one, two);
  }
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(fours[0], fours[1], 0x88),
                                    _mm512_shuffle_f32x4(fours[0], fours[1], 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  const __m512 scores = _mm512_permutexvar_ps(order, sums);
  _mm_storeu_ps(out, _mm512_castps512_ps128(scores));
  _mm_storeu_ps(out + out_stride, _mm512_extractf32x4_ps(scores, 1));
  _mm_storeu_ps(out + 2 * out_stride, _mm512_extractf32x4_ps(scores, 2));
  _mm_storeu_ps(out + 3 * out_stride, _mm512_extractf32x4_ps(scores, 3));
}

template <int M>
void score_rows(const float* const* q, const uint8_t* const* k, int64_t size, float* out,
                int64_t out_stride) {
  __m512 acc[M][kPairs];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < kPairs; ++n) acc[m][n] = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < size; d += 8) {
    __m512 pair[kPairs];
    for (int n = 0; n < kPairs; ++n) {
      const __m512 first = _mm512_castps256_ps512(load(numbers(k[2 * n]) + d));
      pair[n] = _mm512_insertf32x8(first, load(numbers(k[2 * n + 1]) + d), 1);
    }
    for (int m = 0; m < M; ++m) {
      const __m512 query = _mm512_broadcast_f32x8(load(q[m] + d));
      for (int n = 0; n < kPairs; ++n) acc[m][n] = _mm512_fmadd_ps(query, pair[n], acc[m][n]);
    }
  }
  constexpr int kFours = M / 4 * 4;
  for (int m = 0; m < kFours; m += 4) finish_four(acc + m, out + m * out_stride, out_stride);
  for (int m = kFours; m < M; ++m) {
    const __m512 first = acc[m][0], second = acc[m][1];
    _mm_storeu_ps(out + m * out_stride, sum4(low(first), high(first), low(second), high(second)));
  }
}

// M rows, N times sixteen columns from `at` on.
template <int M, int N>
void weigh_columns(const Weighing& w, int64_t at) {
  __m512 acc[M][N];
  for (int m = 0; m < M; ++m) {
    const __m512 factor = _mm512_set1_ps(w.factors[m]);
    for (int n = 0; n < N; ++n) {
      acc[m][n] = _mm512_mul_ps(_mm512_loadu_ps(w.values + m * w.size + at + 16 * n), factor);
    }
  }
  for (int64_t j = 0; j < w.count; ++j) {
    __m512 value[N];
    for (int n = 0; n < N; ++n) value[n] = _mm512_loadu_ps(numbers(w.v[j]) + at + 16 * n);
    for (int m = 0; m < M; ++m) {
      const __m512 score = _mm512_set1_ps(w.scores[m * w.scores_stride + j]);
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_fmadd_ps(score, value[n], acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      _mm512_storeu_ps(w.values + m * w.size + at + 16 * n, acc[m][n]);
    }
  }
}

template <int M>
void weigh_rows(const Weighing& w) {
  int64_t at = 0;
  for (; at + 64 <= w.size; at += 64) weigh_columns<M, 4>(w, at);
  for (; at < w.size; at += 16) weigh_columns<M, 1>(w, at);
}

// As `exp` in simd.h.
inline __m512 exp(__m512 x) {
  const __m512 low = _mm512_set1_ps(kLeastExp), high = _mm512_set1_ps(kMostExp);
  const __m512 clamped = _mm512_min_ps(high, _mm512_max_ps(low, x));
  const __m512 powers = _mm512_mul_ps(clamped, _mm512_set1_ps(kLog2E));
  const __m512 n = _mm512_roundscale_ps(powers, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), clamped);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), r);
  __m512 p = _mm512_set1_ps(kExpTerms[0]);
  for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kExpTerms[i]));
  p = _mm512_fmadd_ps(_mm512_mul_ps(r, r), p, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  p = _mm512_scalef_ps(p, n);
  const __m512 inf = _mm512_set1_ps(std::numeric_limits<float>::infinity());
  p = _mm512_mask_mov_ps(p, _mm512_cmp_ps_mask(x, high, _CMP_GT_OQ), inf);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, low, _CMP_NLT_UQ), p);
}

}  // namespace

float soften_avx512(float* scores, int64_t columns, int64_t begin, int64_t end, float& best,
                    float& total) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  std::fill(scores, scores + begin, kNever);
  std::fill(scores + end, scores + columns, kNever);
  __m512 highest = _mm512_loadu_ps(scores);
  for (int64_t j = 16; j < columns; j += 16) {
    highest = _mm512_max_ps(highest, _mm512_loadu_ps(scores + j));
  }
  const float higher = std::max(best, max_lane(_mm256_max_ps(low(highest), high(highest))));
  const __m512 reference = _mm512_set1_ps(higher);
  Lanes sums = zeros();
  for (int64_t j = 0; j < columns; j += 16) {
    const __m512 p = exp(_mm512_sub_ps(_mm512_loadu_ps(scores + j), reference));
    _mm512_storeu_ps(scores + j, p);
    sums = _mm256_add_ps(_mm256_add_ps(sums, low(p)), high(p));
  }
  const float factor = best == kNever ? 0.0f : exp1(best - higher);
  total = total * factor + sum(sums);
  best = higher;
  return factor;
}

void score_avx512(const float* const* q, int64_t rows, const uint8_t* const* k, int64_t size,
                  float* out, int64_t out_stride) {
  for (int64_t r = 0; r < rows; r += kRows) {
    float* to = out + r * out_stride;
    switch (std::min<int64_t>(kRows, rows - r)) {
      case 8: score_rows<8>(q + r, k, size, to, out_stride); break;
      case 7: score_rows<7>(q + r, k, size, to, out_stride); break;
      case 6: score_rows<6>(q + r, k, size, to, out_stride); break;
      case 5: score_rows<5>(q + r, k, size, to, out_stride); break;
      case 4: score_rows<4>(q + r, k, size, to, out_stride); break;
      case 3: score_rows<3>(q + r, k, size, to, out_stride); break;
      case 2: score_rows<2>(q + r, k, size, to, out_stride); break;
      case 1: score_rows<1>(q + r, k, size, to, out_stride); break;
    }
  }
}

void weigh_avx512(const Weighing& w, int64_t rows) {
  switch (rows) {
    case 2: return weigh_rows<2>(w);
    case 3: return weigh_rows<3>(w);
    default: return weigh_rows<4>(w);
  }
}

}  // namespace octavo
