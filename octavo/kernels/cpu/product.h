// The matrix product behind every linear op: out[t, n] = sum over k of x[t, k] * w[n, k].
//
// Each output is one dot product over eight float32 lanes: lane j adds, in order of k, the products
// at k = j (mod 8) by fused multiply-add; then the lanes are summed by one fixed tree. All tile
// shapes below do exactly that, so a row's result is the same bits in any batch, tile or thread.
#pragma once

#include "pool.h"

#include "native.h"

namespace octavo {

// Rows of activations, taken through `index` where it is given (the tokens of one expert).
struct Rows {
  const float* base;
  int64_t stride;
  const int32_t* index;
  const float* at(int64_t t) const { return base + (index ? index[t] : t) * stride; }
};

// Rows of weights that one thread multiplies at a time; a multiple of the tiles' 3 and 4.
constexpr int64_t kPanelRows = 24;

// out[t * out_stride + n] for weight rows first + n, n < count <= kPanelRows.
void product(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
             float* out, int64_t out_stride, Scratch& scratch);

// Row `index` of a matrix as float32; `out` has room for cols.
void unpack_row(const Matrix& w, int64_t index, float* out);

inline int64_t panels(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

}  // namespace octavo
