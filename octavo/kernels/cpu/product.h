// The matrix product behind every linear op: out[t, n] = sum over k of x[t, k] * w[n, k].
//
// Each output is one dot product over eight float32 lanes: lane j adds, in order of k, the products
// at k = j (mod 8) by fused multiply-add; then the lanes are summed by one fixed tree. All tile
// shapes below do exactly that, so a row's result is the same bits in any batch, tile or thread.
#pragma once

#include "pool.h"

#include <algorithm>

#include "native.h"

namespace octavo {

struct Int8Block;

// Rows of activations, taken through `index` where it is given (the tokens of one expert). narrow,
// blocks: the same in bfloat16, and in blocks of int8, or null where no product asks for that.
struct Rows {
  const float* base;
  int64_t stride;
  const int32_t* index;
  const uint16_t* narrow;
  const Int8Block* blocks;
  const float* at(int64_t t) const { return base + row(t) * stride; }
  const uint8_t* narrow_at(int64_t t) const {
    return reinterpret_cast<const uint8_t*>(narrow + row(t) * stride);
  }
  int64_t row(int64_t t) const { return index ? index[t] : t; }
  Rows through(const int32_t* tokens) const { return {base, stride, tokens, narrow, blocks}; }
  // Those from `start` on.
  Rows from(int64_t start) const;
};

// Rows of weights that one thread multiplies at a time; a multiple of the tiles' 3 and 4.
constexpr int64_t kPanelRows = 24;

constexpr int64_t kFewTokens = 4;   // up to here, weights go from memory to registers
constexpr int64_t kMoreTokens = 8;  // the same for AVX-512, of the formats of pair_formats.h

// out[t * out_stride + n] for weight rows first + n, n < count <= kPanelRows.
using Product = void (*)(const Rows& x, int64_t tokens, const Matrix& w, int64_t first,
                         int64_t count, float* out, int64_t out_stride, Scratch& scratch);

// The same bits from each of them but product_bf16; `Isa` says what the CPU must have.
void product_avx2(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                  float* out, int64_t out_stride, Scratch& scratch);
void product_avx512(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                    float* out, int64_t out_stride, Scratch& scratch);
void product_bf16(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                  float* out, int64_t out_stride, Scratch& scratch);

// What multiplies for a pool. int8: null where activations are not rounded to it.
struct Products {
  Product floats, int8;
  int64_t panel_rows;

  int64_t panels(int64_t rows) const { return (rows + panel_rows - 1) / panel_rows; }
  // As `Product`, with count <= panel_rows.
  void operator()(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                  float* out, int64_t out_stride, Scratch& scratch) const;
};
Products products_of(const Pool& pool);

// Activations as the products of a pool with these weights take them; a copy that they need lies in
// the pool's shared scratch until the next call.
Rows rows_of(Pool* pool, const float* x, int64_t tokens, const Matrix* weights,
             int64_t num_weights);

// Rounds a row to bfloat16, for product_bf16.
void narrow_row(const float* x, int64_t cols, uint16_t* to);

// The same for up to kMoreTokens tokens at x, but only for so many of the first rows as it returns:
// all but an odd last one, or none where it does not know the format.
int64_t stream_avx512(const float* const* x, int64_t tokens, const Matrix& w, int64_t first,
                      int64_t count, float* out, int64_t out_stride);

// Row `index` of a matrix as float32, eight columns at a time, `step` floats apart.
void unpack_row(const Matrix& w, int64_t index, float* out, int64_t step = 8);

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// What the next panel will read, asked for while this one is multiplied: `step` bytes a tile.
struct Ahead {
  const char *at, *end;
  int64_t step;

  void ask() {
    for (const char* stop = std::min(at + step, end); at < stop; at += 64) {
      __builtin_prefetch(at, 0, 2);
    }
  }
};

inline Ahead ahead_of(const Matrix& w, int64_t first, int64_t count, int64_t tiles) {
  const char* next = reinterpret_cast<const char*>(w.data + (first + count) * w.row_bytes);
  const int64_t bytes = count * w.row_bytes;
  return {next, next + bytes, round_up(bytes / tiles + 1, 64)};
}

}  // namespace octavo
