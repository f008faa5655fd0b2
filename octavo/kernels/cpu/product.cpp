#include "product.h"

#include <algorithm>
#include <type_traits>

#include "packed_formats.h"
#include "tiles.h"

namespace octavo {

namespace {

constexpr int64_t kSpan = 768;        // columns of a tile that stay in the first cache
constexpr int64_t kTokenBlock = 64;   // tokens whose unfinished sums are kept between spans
constexpr int64_t kShortRow = 4096;   // bytes of a row of numbers that is better read alone

// Few tokens: N weight rows are read once from memory, for all M tokens; what lies `ahead` bytes
// behind is asked for.
template <class F, int M, int N>
inline void stream_tile(const float* const* x, const Matrix& matrix, const uint8_t* w,
                        int64_t ahead, float* out, int64_t out_stride) {
  Lanes acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] = zeros();
  }
  const int64_t row_bytes = matrix.row_bytes, cols = matrix.cols;
  const int64_t groups = cols / 32;
  const int64_t group_bytes = row_bytes / (groups ? groups : 1);
  typename StateOf<F>::Type states[N];
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4  // else sums of formats that take long to unpack wait in memory
    for (int n = 0; n < N; ++n) {
      const uint8_t* row = w + n * row_bytes;
      _mm_prefetch(reinterpret_cast<const char*>(row + ahead + g * group_bytes), _MM_HINT_T0);
      Lanes v[4];
      group_of<F>(row, g, matrix.table, states[n], v);
      for (int i = 0; i < 4; ++i) {
        for (int m = 0; m < M; ++m) acc[m][n] = fma(load(x[m] + 32 * g + 8 * i), v[i], acc[m][n]);
      }
    }
  }
  if constexpr (!F::kBlocks) {
    for (int64_t k = 32 * groups; k < cols; k += 8) {
      const int64_t left = cols - k;
      for (int n = 0; n < N; ++n) {
        const uint8_t* row = w + n * row_bytes;
        const Lanes v = left >= 8 ? F::eight(row, k) : F::some(row, k, left);
        for (int m = 0; m < M; ++m) {
          acc[m][n] = fma(left >= 8 ? load(x[m] + k) : load_some(x[m] + k, left), v, acc[m][n]);
        }
      }
    }
  }
  finish<M, N>(acc, out, out_stride);
}

template <class F, int M>
void stream(const float* const* x, const Matrix& w, int64_t first, int64_t count, float* out,
            int64_t out_stride) {
  constexpr int N = M == 4 ? 3 : 4;
  const uint8_t* row = w.data + first * w.row_bytes;
  int64_t n = 0, ahead = w.row_bytes;
  if (M == 1 && !F::kBlocks && w.row_bytes <= kShortRow) {
    ahead = kShortRow;  // four short streams that jump, the memory's own prefetcher cannot follow
  } else {
    for (; n + N <= count; n += N) {
      stream_tile<F, M, N>(x, w, row + n * w.row_bytes, N * w.row_bytes, out + n, out_stride);
    }
  }
  for (; n < count; ++n) {
    stream_tile<F, M, 1>(x, w, row + n * w.row_bytes, ahead, out + n, out_stride);
  }
}

// One span of columns of a tile; unfinished sums wait in `kept` ([M][N] lanes) between spans.
struct Span {
  int64_t begin, end;  // end is a multiple of 8, or the row's end
  bool is_first, is_last;
};

template <int M, int N>
inline void span_tile(const float* const* x, const float* w, int64_t w_stride, const Span& span,
                      float* kept, float* out, int64_t out_stride) {
  Lanes acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] = span.is_first ? zeros() : load(kept + 8 * (m * N + n));
  }
  int64_t k = span.begin;
  for (; k + 8 <= span.end; k += 8) {
    Lanes v[N];
    for (int n = 0; n < N; ++n) v[n] = load(w + n * w_stride + k);
    for (int m = 0; m < M; ++m) {
      const Lanes u = load(x[m] + k);
      for (int n = 0; n < N; ++n) acc[m][n] = fma(u, v[n], acc[m][n]);
    }
  }
  if (const int64_t left = span.end - k; left > 0) {
    for (int m = 0; m < M; ++m) {
      const Lanes u = load_some(x[m] + k, left);
      for (int n = 0; n < N; ++n) acc[m][n] = fma(u, load(w + n * w_stride + k), acc[m][n]);
    }
  }
  if (span.is_last) {
    finish<M, N>(acc, out, out_stride);
  } else {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) store(kept + 8 * (m * N + n), acc[m][n]);
    }
  }
}

// All weight rows of a panel, for M tokens and one span.
template <int M>
void span_rows(const float* const* x, const float* panel, int64_t stride, int64_t count,
               const Span& span, float* kept, float* out, int64_t out_stride, Ahead& ahead) {
  constexpr int N = M >= 4 ? 3 : 4;
  int64_t n = 0;
  for (; n + N <= count; n += N) {
    ahead.ask();
    span_tile<M, N>(x, panel + n * stride, stride, span, kept + 8 * M * n, out + n, out_stride);
  }
  for (; n < count; ++n) {
    span_tile<M, 1>(x, panel + n * stride, stride, span, kept + 8 * M * n, out + n, out_stride);
  }
}

// Many tokens: the panel's rows are float32 already (`panel`, zero-padded to `stride`).
void multiply_panel(const Rows& x, int64_t tokens, const float* panel, int64_t stride, int64_t cols,
                    int64_t count, float* out, int64_t out_stride, Ahead ahead, Scratch& scratch) {
  const int64_t spans = (cols + kSpan - 1) / kSpan;
  const int64_t width = round_up((cols + spans - 1) / spans, 8);
  float* kept = scratch.floats(1, 8 * kTokenBlock * kPanelRows);
  for (int64_t block = 0; block < tokens; block += kTokenBlock) {
    const int64_t block_end = std::min(block + kTokenBlock, tokens);
    for (int64_t begin = 0; begin < cols; begin += width) {
      const int64_t end = std::min(begin + width, cols);
      const Span span = {begin, end, begin == 0, end == cols};
      for (int64_t t = block; t < block_end; t += 4) {
        const int64_t some = std::min<int64_t>(4, block_end - t);
        const float* rows[4];
        for (int64_t m = 0; m < some; ++m) rows[m] = x.at(t + m);
        float* keep = kept + 8 * kPanelRows * (t - block);
        float* to = out + t * out_stride;
        const auto rows_of = [&](auto m) {
          span_rows<m>(rows, panel, stride, count, span, keep, to, out_stride, ahead);
        };
        switch (some) {
          case 4: rows_of(std::integral_constant<int, 4>{}); break;
          case 3: rows_of(std::integral_constant<int, 3>{}); break;
          case 2: rows_of(std::integral_constant<int, 2>{}); break;
          case 1: rows_of(std::integral_constant<int, 1>{}); break;
        }
      }
    }
  }
}

template <class F>
void unpack(const Matrix& w, int64_t index, float* out, int64_t step) {
  const uint8_t* row = w.data + index * w.row_bytes;
  const int64_t cols = w.cols, groups = cols / 32;
  typename StateOf<F>::Type state;
  for (int64_t g = 0; g < groups; ++g) {
    Lanes v[4];
    group_of<F>(row, g, w.table, state, v);
    for (int i = 0; i < 4; ++i) store(out + (4 * g + i) * step, v[i]);
  }
  if constexpr (!F::kBlocks) {
    for (int64_t k = 32 * groups; k < cols; k += 8) {
      const int64_t left = cols - k;
      float* to = out + k / 8 * step;
      if (left >= 8) {
        store(to, F::eight(row, k));
      } else {
        store_some(to, left, F::some(row, k, left));
      }
    }
  }
}

}  // namespace

void unpack_row(const Matrix& w, int64_t index, float* out, int64_t step) {
  with_format(w.format, [&](auto format) {
    unpack<decltype(format)>(w, index, out, step);
  });
}

void product_avx2(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                  float* out, int64_t out_stride, Scratch& scratch) {
  if (tokens > kFewTokens) {
    const int64_t stride = round_up(w.cols, 8) + 8;  // rows of 2^n bytes would share cache sets
    float* panel = scratch.floats(0, stride * kPanelRows);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t k = w.cols; k < stride; ++k) panel[n * stride + k] = 0.0f;
      unpack_row(w, first + n, panel + n * stride);
    }
    const Ahead ahead = ahead_of(w, first, count, (tokens + 3) / 4 * ((count + 2) / 3));
    multiply_panel(x, tokens, panel, stride, w.cols, count, out, out_stride, ahead, scratch);
    return;
  }
  const float* rows[kFewTokens];
  for (int64_t t = 0; t < tokens; ++t) rows[t] = x.at(t);
  with_format(w.format, [&](auto format) {
    using F = decltype(format);
    switch (tokens) {
      case 1: return stream<F, 1>(rows, w, first, count, out, out_stride);
      case 2: return stream<F, 2>(rows, w, first, count, out, out_stride);
      case 3: return stream<F, 3>(rows, w, first, count, out, out_stride);
      case 4: return stream<F, 4>(rows, w, first, count, out, out_stride);
    }
  });
}

}  // namespace octavo
