// Products of few tokens with AVX-512: two rows of weights go side by side from memory to
// registers, eight lanes each, so that every sum has the order, and the bits, of product.h.
#include "product.h"

#include <type_traits>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#define OCTAVO_ISA avx512
#include "pair_formats.h"

namespace octavo {

namespace {

// N pairs of rows for all M tokens. Not inlined: in one function of all formats the compiler would
// no longer inline what must be.
template <class P, int M, int N>
__attribute__((noinline)) void stream_pairs(const float* const* x, const Matrix& matrix,
                                            const uint8_t* w, float* out, int64_t out_stride) {
  Wide acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] = _mm512_setzero_ps();
  }
  const int64_t row_bytes = matrix.row_bytes, groups = matrix.cols / 32;
  const int64_t ahead = 2 * N * row_bytes, group_bytes = row_bytes / groups;
  typename P::State states[N];
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const uint8_t *a = w + 2 * n * row_bytes, *b = a + row_bytes;
      const uint8_t* coming = a + ahead + g * group_bytes;
      _mm_prefetch(reinterpret_cast<const char*>(coming), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(coming + row_bytes), _MM_HINT_T0);
      Wide v[4];
      P::group(a, b, g, states[n], v);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Wide u = _mm512_broadcast_f32x8(load(x[m] + 32 * g + 8 * i));
          acc[m][n] = _mm512_fmadd_ps(u, v[i], acc[m][n]);
        }
      }
    }
  }
  finish_pairs<M, N>(acc, 2 * N, out, out_stride);
}

template <class P, int M>
int64_t stream(const float* const* x, const Matrix& w, int64_t first, int64_t count, float* out,
               int64_t out_stride) {
  constexpr int N = M > 2 ? 2 : 3;  // one token alone would wait for its own sums
  const uint8_t* row = w.data + first * w.row_bytes;
  int64_t n = 0;
  for (; n + 2 * N <= count; n += 2 * N) {
    stream_pairs<P, M, N>(x, w, row + n * w.row_bytes, out + n, out_stride);
  }
  for (; n + 2 <= count; n += 2) {
    stream_pairs<P, M, 1>(x, w, row + n * w.row_bytes, out + n, out_stride);
  }
  return n;
}

}  // namespace

int64_t stream_avx512(const float* const* x, int64_t tokens, const Matrix& w, int64_t first,
                      int64_t count, float* out, int64_t out_stride) {
  int64_t done = 0;
  with_pair_format(w, [&](auto format) {
    using P = decltype(format);
    switch (tokens) {
      case 1: done = stream<P, 1>(x, w, first, count, out, out_stride); break;
      case 2: done = stream<P, 2>(x, w, first, count, out, out_stride); break;
      case 3: done = stream<P, 3>(x, w, first, count, out, out_stride); break;
      case 4: done = stream<P, 4>(x, w, first, count, out, out_stride); break;
      case 5: done = stream<P, 5>(x, w, first, count, out, out_stride); break;
      case 6: done = stream<P, 6>(x, w, first, count, out, out_stride); break;
      case 7: done = stream<P, 7>(x, w, first, count, out, out_stride); break;
      case 8: done = stream<P, 8>(x, w, first, count, out, out_stride); break;
    }
  });
  return done;
}

}  // namespace octavo
