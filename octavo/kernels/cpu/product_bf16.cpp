// Products of bfloat16 weights with activations rounded to bfloat16, in AVX-512's BF16 instructions.
//
// Each output is one dot product over sixteen float32 lanes: lane j adds, in order of k, the sums of
// the products at k = 2j and 2j + 1 (mod 32) as the instruction rounds them; then lanes j and j + 8
// are added, and those eight as in product.h. So a row's result is the same bits in any batch, tile
// or thread, but not those of float32.
#include "product.h"

#include <algorithm>
#include <type_traits>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512bf16")
#define OCTAVO_ISA avx512_bf16
#include "tiles.h"

namespace octavo {

namespace {

constexpr int kRows = 6;             // of weights in a tile
constexpr int64_t kTokenBlock = 64;  // tokens that stay in the second cache

// 32 numbers, of which those that `kept` leaves out are zero and not touched.
inline __m512bh some32(const uint8_t* p, __mmask32 kept) {
  return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(kept, p));
}
inline __m512bh all32(const uint8_t* p) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
}

template <int M, int N>
__attribute__((noinline)) void tile(const uint8_t* const* x, const Matrix& matrix, const uint8_t* w,
                                    float* out, int64_t out_stride) {
  __m512 acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) acc[m][n] = _mm512_setzero_ps();
  }
  const int64_t row_bytes = matrix.row_bytes, ahead = N * row_bytes, end = matrix.cols / 32 * 32;
  for (int64_t k = 0; k < end; k += 32) {
    __m512bh v[N];
    for (int n = 0; n < N; ++n) {
      const uint8_t* at = w + n * row_bytes + 2 * k;
      if (M <= 2) _mm_prefetch(reinterpret_cast<const char*>(at + ahead), _MM_HINT_T0);
      v[n] = all32(at);
    }
    for (int m = 0; m < M; ++m) {
      const __m512bh u = all32(x[m] + 2 * k);
      for (int n = 0; n < N; ++n) acc[m][n] = _mm512_dpbf16_ps(acc[m][n], u, v[n]);
    }
  }
  if (const int64_t left = matrix.cols - end; left > 0) {
    const __mmask32 kept = (static_cast<__mmask32>(1) << left) - 1;
    for (int n = 0; n < N; ++n) {
      const __m512bh v = some32(w + n * row_bytes + 2 * end, kept);
      for (int m = 0; m < M; ++m) {
        acc[m][n] = _mm512_dpbf16_ps(acc[m][n], some32(x[m] + 2 * end, kept), v);
      }
    }
  }
  Lanes sums[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const Lanes high = _mm512_extractf32x8_ps(acc[m][n], 1);
      sums[m][n] = _mm256_add_ps(_mm512_castps512_ps256(acc[m][n]), high);
    }
  }
  finish<M, N>(sums, out, out_stride);
}

template <int N>
void rows_tile(const Rows& x, int64_t begin, int64_t end, const Matrix& w, int64_t row, float* out,
               int64_t out_stride) {
  const uint8_t* at = w.data + row * w.row_bytes;
  for (int64_t t = begin; t < end; t += 4) {
    const int64_t some = std::min<int64_t>(4, end - t);
    const uint8_t* tokens[4];
    for (int64_t m = 0; m < some; ++m) tokens[m] = x.narrow_at(t + m);
    float* to = out + t * out_stride;
    switch (some) {
      case 4: tile<4, N>(tokens, w, at, to, out_stride); break;
      case 3: tile<3, N>(tokens, w, at, to, out_stride); break;
      case 2: tile<2, N>(tokens, w, at, to, out_stride); break;
      case 1: tile<1, N>(tokens, w, at, to, out_stride); break;
    }
  }
}

}  // namespace

void narrow_row(const float* x, int64_t cols, uint16_t* to) {
  int64_t k = 0;
  for (; k + 16 <= cols; k += 16) {
    const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(x + k)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), narrow);
  }
  if (const int64_t left = cols - k; left > 0) {
    const __mmask16 kept = static_cast<__mmask16>((1u << left) - 1);
    const __m512 last = _mm512_maskz_loadu_ps(kept, x + k);
    const auto narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(last));
    _mm256_mask_storeu_epi16(to + k, kept, narrow);
  }
}

void product_bf16(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                  float* out, int64_t out_stride, Scratch& scratch) {
  if (w.format != BF16) {
    return product_avx512(x, tokens, w, first, count, out, out_stride, scratch);
  }
  for (int64_t begin = 0; begin < tokens; begin += kTokenBlock) {
    const int64_t end = std::min(begin + kTokenBlock, tokens);
    int64_t n = 0;
    for (; n + kRows <= count; n += kRows) {
      rows_tile<kRows>(x, begin, end, w, first + n, out + n, out_stride);
    }
    for (; n < count; ++n) rows_tile<1>(x, begin, end, w, first + n, out + n, out_stride);
  }
}

}  // namespace octavo
