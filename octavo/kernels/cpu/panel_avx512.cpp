// Products of many tokens with AVX-512: two rows of weights lie side by side in a register, eight
// lanes each, so that every sum has the order, and the bits, of product.h.
#include "product.h"

#include <algorithm>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")
#define OCTAVO_ISA avx512
#include "pair_formats.h"

namespace octavo {

namespace {

constexpr int64_t kSpan = 512;       // columns of a tile of weights that stay in the first cache
constexpr int64_t kTokenBlock = 64;  // tokens whose unfinished sums are kept between spans
constexpr int kPairs = 6;            // pairs of weight rows of a tile

inline Wide twice(Lanes v) { return _mm512_broadcast_f32x8(v); }

// One span of columns; unfinished sums wait in `kept` between spans.
struct Span {
  int64_t begin, end;  // end is a multiple of 8, or the row's end
  bool is_first, is_last;
};

// The rows of `pairs` pairs, their columns by eights: panel[pair][column / 8][row of pair][8].
struct Panel {
  const float* at;
  int64_t stride;  // floats of a pair
  int64_t count;   // rows, the last pair's second left out where they are odd
};

// `coming`: the rows that the next tile multiplies, asked for meanwhile; a step's activations do not
// stay in the second cache.
template <int M, int N>
inline void pairs_tile(const float* const* x, const float* const* coming, const float* w,
                       int64_t w_stride, const Span& span, int64_t rows, float* kept, float* out,
                       int64_t out_stride) {
  Wide acc[M][N];
  if (span.is_first) {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_setzero_ps();
    }
  } else {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_loadu_ps(kept + 16 * (m * N + n));
    }
  }
  int64_t k = span.begin;
  for (; k + 8 <= span.end; k += 8) {
    if (M == 4) {  // two rows' next sixteen numbers, now and eight columns later those of the others
      const float* const* two = coming + (k >> 2 & 2);
      _mm_prefetch(reinterpret_cast<const char*>(two[0] + k), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(two[1] + k), _MM_HINT_T0);
    }
    Wide v[N];
    for (int n = 0; n < N; ++n) v[n] = _mm512_loadu_ps(w + n * w_stride + 2 * k);
    for (int m = 0; m < M; ++m) {
      const Wide u = twice(load(x[m] + k));
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_fmadd_ps(u, v[n], acc[m][n]);
    }
  }
  if (const int64_t left = span.end - k; left > 0) {
    for (int m = 0; m < M; ++m) {
      const Wide u = twice(load_some(x[m] + k, left));
      for (int n = 0; n < N; ++n) {
        acc[m][n] = _mm512_fmadd_ps(u, _mm512_loadu_ps(w + n * w_stride + 2 * k), acc[m][n]);
      }
    }
  }
  if (span.is_last) return finish_pairs<M, N>(acc, rows, out, out_stride);
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(kept + 16 * (m * N + n), acc[m][n]);
  }
}

// N pairs from `pair` on for all tokens of a block and one span: those weights stay in the first
// cache. `kept` has room for the tile's sums of kTokenBlock tokens.
template <int N>
void tile_of_pairs(const Rows& x, int64_t begin, int64_t end, const Panel& panel, int64_t pair,
                   const Span& span, float* kept, float* out, int64_t out_stride, Ahead& ahead) {
  const float* w = panel.at + pair * panel.stride;
  const int64_t rows = std::min<int64_t>(2 * N, panel.count - 2 * pair);
  for (int64_t t = begin; t < end; t += 4) {
    const int64_t some = std::min<int64_t>(4, end - t);
    const float *tokens[4], *coming[4];
    for (int64_t m = 0; m < some; ++m) {
      tokens[m] = x.at(t + m);
      coming[m] = x.at(std::min(t + m + 4, end - 1));
    }
    ahead.ask();
    float *keep = kept + 16 * N * (t - begin), *to = out + t * out_stride + 2 * pair;
    const auto tile = [&](auto m) {
      pairs_tile<m, N>(tokens, coming, w, panel.stride, span, rows, keep, to, out_stride);
    };
    switch (some) {
      case 4: tile(std::integral_constant<int, 4>{}); break;
      case 3: tile(std::integral_constant<int, 3>{}); break;
      case 2: tile(std::integral_constant<int, 2>{}); break;
      case 1: tile(std::integral_constant<int, 1>{}); break;
    }
  }
}

void multiply_panel(const Rows& x, int64_t tokens, const Panel& panel, int64_t cols, float* out,
                    int64_t out_stride, Ahead ahead, Scratch& scratch) {
  const int64_t spans = (cols + kSpan - 1) / kSpan, pairs = (panel.count + 1) / 2;
  const int64_t width = round_up((cols + spans - 1) / spans, 8);
  float* kept = scratch.floats(1, 16 * kTokenBlock * kPanelRows / 2);
  for (int64_t begin = 0; begin < tokens; begin += kTokenBlock) {
    const int64_t end = std::min(begin + kTokenBlock, tokens);
    for (int64_t from = 0; from < cols; from += width) {
      const int64_t to = std::min(from + width, cols);
      const Span span = {from, to, from == 0, to == cols};
      const auto tile = [&](auto n, int64_t pair) {
        tile_of_pairs<n>(x, begin, end, panel, pair, span, kept + 16 * kTokenBlock * pair, out,
                         out_stride, ahead);
      };
      int64_t pair = 0;
      for (; pair + kPairs <= pairs; pair += kPairs) {
        tile(std::integral_constant<int, kPairs>{}, pair);
      }
      for (; pair + 2 <= pairs; pair += 2) tile(std::integral_constant<int, 2>{}, pair);
      if (pair < pairs) tile(std::integral_constant<int, 1>{}, pair);
    }
  }
}

// Two rows as float32, eight columns of each in turn.
template <class P>
__attribute__((noinline)) void unpack_pair(const uint8_t* a, const uint8_t* b, int64_t groups,
                                           float* to) {
  typename P::State state;
  for (int64_t g = 0; g < groups; ++g) {
    Wide v[4];
    P::group(a, b, g, state, v);
    for (int i = 0; i < 4; ++i) _mm512_storeu_ps(to + 16 * (4 * g + i), v[i]);
  }
}

// Rows `first` and `second` of w, side by side.
void unpack_rows(const Matrix& w, int64_t first, int64_t second, float* to) {
  const uint8_t *a = w.data + first * w.row_bytes, *b = w.data + second * w.row_bytes;
  const bool is_done = with_pair_format(w, [&](auto format) {
    unpack_pair<decltype(format)>(a, b, w.cols / 32, to);
  });
  if (is_done) return;
  unpack_row(w, first, to, 16);
  unpack_row(w, second, to + 8, 16);
}

// As stream_avx512, of as many tokens as are faster so; bfloat16 is unpacked at so little cost that
// it may be done for every eight of them.
int64_t stream_all(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                   float* out, int64_t out_stride) {
  const int64_t parts = (tokens + kMoreTokens - 1) / kMoreTokens;
  if (parts > (w.format == BF16 ? 2 : 1)) return 0;
  int64_t done = 0;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part * tokens / parts, some = (part + 1) * tokens / parts - begin;
    const float* rows[kMoreTokens];
    for (int64_t t = 0; t < some; ++t) rows[t] = x.at(begin + t);
    done = stream_avx512(rows, some, w, first, count, out + begin * out_stride, out_stride);
    if (done == 0) return 0;
  }
  return done;
}

}  // namespace

void product_avx512(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                    float* out, int64_t out_stride, Scratch& scratch) {
  const int64_t done = stream_all(x, tokens, w, first, count, out, out_stride);
  if (done == count) return;
  if (done > 0 || tokens <= kFewTokens) {
    return product_avx2(x, tokens, w, first + done, count - done, out + done, out_stride, scratch);
  }
  // Rows of 2^n bytes would share cache sets.
  const int64_t padded = round_up(w.cols, 8), stride = 2 * padded + 16;
  float* at = scratch.floats(0, stride * kPanelRows / 2);
  for (int64_t n = 0; n < count; n += 2) {
    float* to = at + n / 2 * stride;
    unpack_rows(w, first + n, first + std::min(n + 1, count - 1), to);
    for (int64_t k = w.cols; k < padded; ++k) {
      to[k / 8 * 16 + k % 8] = to[k / 8 * 16 + 8 + k % 8] = 0.0f;
    }
  }
  const Ahead ahead = ahead_of(w, first, count, (tokens + 3) / 4 * ((count + 11) / 12));
  multiply_panel(x, tokens, {at, stride, count}, w.cols, out, out_stride, ahead, scratch);
}

}  // namespace octavo
