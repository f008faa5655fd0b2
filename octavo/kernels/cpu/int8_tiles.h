// Integer products in any instruction set: kLanes rows of weights are unpacked side by side, for one
// token from memory to registers, for more into a panel that all of them are multiplied with.
#pragma once

#include "int8.h"
#include "int8_formats.h"

namespace octavo {
inline namespace OCTAVO_ISA {

// Adds a group's products with M tokens, whose blocks of the group are x[m][g]. Sums of all tokens
// grow side by side, since a sum alone would wait for itself.
template <class Shape, int M>
OCTAVO_INLINE void add_group(const Group& w, const Int8Block* const (&x)[M], int64_t g,
                             Floats (&acc)[M]) {
  constexpr int kWords = 8 / Shape::kHalves, kStep = words_at_once<Shape>();
  constexpr int kBias = bias_of<Shape>();
#pragma GCC unroll 2
  for (int h = 0; h < Shape::kHalves; ++h) {
    Words dots[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const int32_t* sums = x[m][g].sums;
      dots[m] = words(kBias == 0 ? 0 : -kBias * (Shape::kHalves == 2 ? sums[h] : sums[0] + sums[1]));
    }
#pragma GCC unroll 8
    for (int j = kWords * h; j < kWords * (h + 1); j += kStep) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        dots[m] = dot<Shape::kBits, kStep>(dots[m], w.codes + j, x[m][g].numbers + 4 * j);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      acc[m] = fma(floats(dots[m]), w.scale[h] * all(x[m][g].scale), acc[m]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; Shape::kOffset && m < M; ++m) {
    acc[m] = fma(w.offset, all(x[m][g].scaled_sum), acc[m]);
  }
}

// What the next kLanes rows will read for this group.
OCTAVO_INLINE void ask_ahead(const uint8_t* at, int64_t stride, int64_t g, int64_t group_bytes) {
  const uint8_t* coming = at + kLanes * (stride + g * group_bytes);
  for (int64_t i = 0; i < kLanes * group_bytes; i += 64) __builtin_prefetch(coming + i, 0, 3);
}

template <class F>
__attribute__((noinline)) void stream(const Int8Block* x, const uint8_t* at, int64_t stride,
                                      int64_t groups, float* out) {
  const Int8Block* const row[1] = {x};
  Floats acc[1] = {all(0.0f)};
  typename F::State state;
  for (int64_t g = 0; g < groups; ++g) {
    ask_ahead(at, stride, g, stride / groups);
    Group w;
    F::group(at, stride, g, state, w);
    add_group<typename F::Shape, 1>(w, row, g, acc);
  }
  put(out, acc[0]);
}

template <class F>
__attribute__((noinline)) void unpack(const uint8_t* at, int64_t stride, int64_t groups,
                                      Group* panel) {
  typename F::State state;
  for (int64_t g = 0; g < groups; ++g) {
    ask_ahead(at, stride, g, stride / groups);
    F::group(at, stride, g, state, panel[g]);
  }
}

// M tokens from t on.
template <class Shape, int M>
__attribute__((noinline)) void tile(const Rows& x, int64_t t, const Group* panel, int64_t groups,
                                    float* out, int64_t out_stride) {
  const Int8Block* rows[M];
  Floats acc[M];
  for (int m = 0; m < M; ++m) {
    rows[m] = blocks_at(x, t + m);
    acc[m] = all(0.0f);
  }
  for (int64_t g = 0; g < groups; ++g) add_group<Shape, M>(panel[g], rows, g, acc);
  for (int m = 0; m < M; ++m) put(out + (t + m) * out_stride, acc[m]);
}

template <class Shape>
void multiply(const Rows& x, int64_t tokens, const Group* panel, int64_t groups, float* out,
              int64_t out_stride) {
  int64_t t = 0;
  for (; t + kTokens <= tokens; t += kTokens) {
    tile<Shape, kTokens>(x, t, panel, groups, out, out_stride);
  }
  for (; t + 2 <= tokens; t += 2) tile<Shape, 2>(x, t, panel, groups, out, out_stride);
  if (t < tokens) tile<Shape, 1>(x, t, panel, groups, out, out_stride);
}

// The products of kLanes rows at `at`.
template <class F>
void multiply_rows(const Rows& x, int64_t tokens, const Matrix& w, const uint8_t* at, float* out,
                   int64_t out_stride, Scratch& scratch) {
  const int64_t groups = w.cols / 32;
  if (tokens == 1) return stream<F>(blocks_at(x, 0), at, w.row_bytes, groups, out);
  float* room = scratch.floats(3, groups * sizeof(Group) / sizeof(float));
  Group* panel = reinterpret_cast<Group*>(room);
  unpack<F>(at, w.row_bytes, groups, panel);
  multiply<typename F::Shape>(x, tokens, panel, groups, out, out_stride);
}

inline void int8_product(const Rows& x, int64_t tokens, const Matrix& w, int64_t first,
                         int64_t count, float* out, int64_t out_stride, Scratch& scratch) {
  with_int8_format(w.format, [&](auto format) {
    using F = decltype(format);
    const uint8_t* at = w.data + first * w.row_bytes;
    int64_t n = 0;
    for (; n + kLanes <= count; n += kLanes, at += kLanes * w.row_bytes) {
      multiply_rows<F>(x, tokens, w, at, out + n, out_stride, scratch);
    }
    const int64_t left = count - n;
    if (left == 0) return;
    // Too few rows for a register: copied, with zeros behind them.
    const size_t bytes = left * w.row_bytes, room = kLanes * w.row_bytes;
    uint8_t* padded = reinterpret_cast<uint8_t*>(scratch.floats(4, room / sizeof(float) + 1));
    std::memcpy(padded, at, bytes);
    std::memset(padded + bytes, 0, room - bytes);
    float* wide = scratch.floats(5, tokens * kLanes);
    multiply_rows<F>(x, tokens, w, padded, wide, kLanes, scratch);
    for (int64_t t = 0; t < tokens; ++t) {
      std::copy_n(wide + t * kLanes, left, out + t * out_stride + n);
    }
  });
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
