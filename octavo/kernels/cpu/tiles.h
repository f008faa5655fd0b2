// Register tiles that products and attention share. Vectors of format F are widened as they are
// loaded; the order of additions is the same in every tile shape (see product.h).
#pragma once

#include "attention_wide.h"
#include "formats.h"

namespace octavo {
inline namespace OCTAVO_ISA {

// Writes M x N sums of lanes.
template <int M, int N>
inline void finish(const Lanes (&acc)[M][N], float* out, int64_t out_stride) {
  for (int m = 0; m < M; ++m) {
    float* row = out + m * out_stride;
    if constexpr (N == 4) {
      _mm_storeu_ps(row, sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]));
    } else if constexpr (N == 3) {
      const __m128 v = sum4(acc[m][0], acc[m][1], acc[m][2], acc[m][2]);
      _mm_storel_pi(reinterpret_cast<__m64*>(row), v);
      row[2] = _mm_cvtss_f32(_mm_movehl_ps(v, v));
    } else {
      for (int n = 0; n < N; ++n) row[n] = sum(acc[m][n]);
    }
  }
}

// out[m][n] = x[m] . w[n] over `size` elements, a multiple of 8.
template <class F, int M, int N>
inline void dot_tile(const float* const* x, const uint8_t* const* w, int64_t size, float* out,
                     int64_t out_stride) {
  Lanes acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] = zeros();
  }
  for (int64_t k = 0; k < size; k += 8) {
    Lanes v[N];
    for (int n = 0; n < N; ++n) v[n] = F::eight(w[n], k);
    for (int m = 0; m < M; ++m) {
      const Lanes u = load(x[m] + k);
      for (int n = 0; n < N; ++n) acc[m][n] = fma(u, v[n], acc[m][n]);
    }
  }
  finish<M, N>(acc, out, out_stride);
}

// `ahead.ask(n)` asks the memory for n vectors that are wanted next, a few between tiles.
template <class F, int M, class Ahead>
void dot_rows(const float* const* x, const uint8_t* const* w, int64_t w_count, int64_t size,
              float* out, int64_t out_stride, Ahead& ahead) {
  int64_t n = 0;
  for (; n + 4 <= w_count; n += 4) {
    ahead.ask(4);
    dot_tile<F, M, 4>(x, w + n, size, out + n, out_stride);
  }
  for (; n < w_count; ++n) dot_tile<F, M, 1>(x, w + n, size, out + n, out_stride);
}

// Tiles of 3 x 4: short vectors spend a third of the time on sums of lanes, which 4 x 3 wastes.
template <class F, class Ahead>
void dot_products(const float* const* x, int64_t x_count, const uint8_t* const* w, int64_t w_count,
                  int64_t size, float* out, int64_t out_stride, Ahead& ahead) {
  for (int64_t m = 0; m < x_count; m += 3) {
    float* to = out + m * out_stride;
    switch (x_count - m) {
      case 1: dot_rows<F, 1>(x + m, w, w_count, size, to, out_stride, ahead); break;
      case 2: dot_rows<F, 2>(x + m, w, w_count, size, to, out_stride, ahead); break;
      default: dot_rows<F, 3>(x + m, w, w_count, size, to, out_stride, ahead); break;
    }
  }
}

template <class F, int M, int N, class Ahead>
inline void weigh_tile(const Weighing& w, int64_t at, Ahead& ahead) {
  Lanes acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const Lanes old = load(w.values + m * w.size + at + 8 * n);
      acc[m][n] = _mm256_mul_ps(old, broadcast(w.factors[m]));
    }
  }
  for (int64_t j = 0; j < w.count; ++j) {
    if (j % 4 == 0) ahead.ask(1);
    Lanes u[N];
    for (int n = 0; n < N; ++n) u[n] = F::eight(w.v[j], at + 8 * n);
    for (int m = 0; m < M; ++m) {
      const Lanes p = broadcast(w.scores[m * w.scores_stride + j]);
      for (int n = 0; n < N; ++n) acc[m][n] = fma(p, u[n], acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(w.values + m * w.size + at + 8 * n, acc[m][n]);
  }
}

template <class F, int M, class Ahead>
void weigh_rows(const Weighing& w, Ahead& ahead) {
  // One row alone would wait for its own sums: more columns at once.
  constexpr int N = M == 1 ? 4 : 2;
  int64_t at = 0;
  for (; at + 8 * N <= w.size; at += 8 * N) weigh_tile<F, M, N>(w, at, ahead);
  for (; at + 16 <= w.size; at += 16) weigh_tile<F, M, 2>(w, at, ahead);
  for (; at < w.size; at += 8) weigh_tile<F, M, 1>(w, at, ahead);
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
