// Register tiles of attention in AVX-512, for float32 vectors: the bits of those in tiles.h.
#pragma once

#include <cstdint>

namespace octavo {

// How M rows of values are to be weighed: values = values * factors + sum of scores[j] * v[j].
struct Weighing {
  const float *scores, *factors;
  int64_t scores_stride;
  const uint8_t* const* v;
  int64_t count;
  float* values;
  int64_t size;  // of a row of values, a multiple of 8
};

constexpr int64_t kWideKeys = 4;  // of a tile

// out[m * out_stride + n] = q[m] . k[n] over `size` elements, a multiple of 8, for kWideKeys keys.
void score_avx512(const float* const* q, int64_t rows, const uint8_t* const* k, int64_t size,
                  float* out, int64_t out_stride);

// As `soften` in softmax.h, of so many columns, a multiple of 16.
float soften_avx512(float* scores, int64_t columns, int64_t begin, int64_t end, float& best,
                    float& total);

// Weighs so many rows of values, 2 to 4, whose size is a multiple of 16.
void weigh_avx512(const Weighing& w, int64_t rows);

}  // namespace octavo
