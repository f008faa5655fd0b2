// Products of block formats with activations rounded to int8, in integers.
//
// A row of activations is cut into blocks of 32: the largest |x| over 127 is a block's scale, its
// numbers are x over it, rounded to nearest. Each output adds, block after block and by fused
// multiply-adds, float(sum of code * number) * (weight scale * activation scale), twice where a
// format has a scale for every 16 codes, then offset * (activation scale * sum of the numbers) where
// it has an offset. The sums of integers are exact, so the bits are the same in every batch, tile,
// thread and instruction set, but not those of float32.
#pragma once

#include "product.h"

namespace octavo {

// 32 numbers of a row of activations.
struct Int8Block {
  int8_t numbers[32];
  float scale, scaled_sum;  // scaled_sum: scale * (sum of the numbers)
  int32_t sums[2];          // of the first 16 numbers, of the others
};

inline const Int8Block* blocks_at(const Rows& x, int64_t t) {
  return x.blocks + x.row(t) * (x.stride / 32);
}

// Whether a format's codes can be multiplied so.
bool has_int8_product(int64_t format);

// Rounds a row of `cols` (a multiple of 32) numbers. A block with a NaN or an infinity makes every
// output NaN.
void round_row(const float* x, int64_t cols, Int8Block* to);

// As `Product` in product.h, of formats that have it; a panel may have kInt8PanelRows rows.
constexpr int64_t kInt8PanelRows = 48;
void int8_product_avx2(const Rows& x, int64_t tokens, const Matrix& w, int64_t first, int64_t count,
                       float* out, int64_t out_stride, Scratch& scratch);
void int8_product_avx512(const Rows& x, int64_t tokens, const Matrix& w, int64_t first,
                         int64_t count, float* out, int64_t out_stride, Scratch& scratch);

}  // namespace octavo
