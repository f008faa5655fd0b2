// Which products a pool multiplies with, and activations in the form that they take.
#include "product.h"

#include <algorithm>

#include "int8.h"

namespace octavo {

namespace {

bool is_any(const Matrix* weights, int64_t count, bool (*fits)(int64_t format)) {
  return std::any_of(weights, weights + count, [&](const Matrix& w) { return fits(w.format); });
}

}  // namespace

Products products_of(const Pool& pool) {
  const Isa isa = pool.isa();
  const Product floats = isa == AVX512_BF16 ? product_bf16
                         : isa == AVX512    ? product_avx512
                                            : product_avx2;
  if (!pool.rounds_to_int8()) return {floats, nullptr, kPanelRows};
  return {floats, isa == AVX2 ? int8_product_avx2 : int8_product_avx512, kInt8PanelRows};
}

void Products::operator()(const Rows& x, int64_t tokens, const Matrix& w, int64_t first,
                          int64_t count, float* out, int64_t out_stride, Scratch& scratch) const {
  if (int8 != nullptr && has_int8_product(w.format)) {
    return int8(x, tokens, w, first, count, out, out_stride, scratch);
  }
  for (int64_t n = 0; n < count; n += kPanelRows) {
    const int64_t some = std::min(kPanelRows, count - n);
    floats(x, tokens, w, first + n, some, out + n, out_stride, scratch);
  }
}

Rows Rows::from(int64_t start) const {
  return {base + start * stride, stride, nullptr, narrow ? narrow + start * stride : nullptr,
          blocks ? blocks + start * (stride / 32) : nullptr};
}

Rows rows_of(Pool* pool, const float* x, int64_t tokens, const Matrix* weights,
             int64_t num_weights) {
  const int64_t cols = weights[0].cols;
  Rows rows = {x, cols, nullptr, nullptr, nullptr};
  const auto is_bf16 = [](int64_t format) { return format == BF16; };
  if (pool->isa() == AVX512_BF16 && is_any(weights, num_weights, is_bf16)) {
    float* room = pool->shared().floats(0, (tokens * cols + 1) / 2);
    uint16_t* narrow = reinterpret_cast<uint16_t*>(room);
    pool->run(tokens, 16, [&](int64_t t, Scratch&) {
      narrow_row(x + t * cols, cols, narrow + t * cols);
    });
    rows.narrow = narrow;
  }
  if (pool->rounds_to_int8() && is_any(weights, num_weights, has_int8_product)) {
    const int64_t groups = cols / 32;
    float* room = pool->shared().floats(1, tokens * groups * sizeof(Int8Block) / sizeof(float));
    Int8Block* blocks = reinterpret_cast<Int8Block*>(room);
    pool->run(tokens, 16, [&](int64_t t, Scratch&) {
      round_row(x + t * cols, cols, blocks + t * groups);
    });
    rows.blocks = blocks;
  }
  return rows;
}

}  // namespace octavo
