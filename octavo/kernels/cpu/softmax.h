// Softmax over tiles of scores: what is kept of a row between tiles, and how rows of different tiles
// are joined. Included after all standard headers.
#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace octavo {

constexpr int64_t kTile = 64;  // tokens whose scores are softened at once
constexpr float kNever = -std::numeric_limits<float>::infinity();

// Running softmax of some rows: their maximum, sum of exponentials and weighted values.
struct State {
  float *best, *total, *values;
};

inline State state_at(float* base, int64_t rows) { return {base, base + rows, base + 2 * rows}; }

// cap * tanh(score / cap) = cap - 2 cap / (exp(2 score / cap) + 1) of a whole tile's columns, those
// that hold no score too.
inline void cap_scores(float* scores, float cap) {
  const Lanes one = broadcast(1.0f), twice = broadcast(2.0f * cap), limit = broadcast(cap);
  const Lanes stretch = broadcast(2.0f / cap);
  for (int64_t j = 0; j < kTile; j += 8) {
    const Lanes e = exp(_mm256_mul_ps(load(scores + j), stretch));
    const Lanes below = _mm256_div_ps(twice, _mm256_add_ps(e, one));
    store(scores + j, _mm256_sub_ps(limit, below));
  }
}

// Scores of one row become probabilities relative to the new maximum; returns the old state's
// factor. Columns outside [begin, end) become 0.
inline float soften(float* scores, int64_t begin, int64_t end, float& best, float& total) {
  std::fill(scores, scores + begin, kNever);
  std::fill(scores + end, scores + kTile, kNever);
  Lanes highest = load(scores);
  for (int64_t j = 8; j < kTile; j += 8) highest = _mm256_max_ps(highest, load(scores + j));
  const float higher = std::max(best, max_lane(highest));
  const Lanes reference = broadcast(higher);
  Lanes sums = zeros();
  for (int64_t j = 0; j < kTile; j += 8) {
    const Lanes p = exp(_mm256_sub_ps(load(scores + j), reference));
    store(scores + j, p);
    sums = _mm256_add_ps(sums, p);
  }
  const float factor = best == kNever ? 0.0f : exp1(best - higher);
  total = total * factor + sum(sums);
  best = higher;
  return factor;
}

inline void clear(const State& state, int64_t rows, int64_t padded) {
  std::fill(state.best, state.best + rows, kNever);
  std::fill(state.total, state.total + rows, 0.0f);
  std::fill(state.values, state.values + rows * padded, 0.0f);
}

// into = into (earlier tokens) joined with `later`; a state that saw nothing changes nothing.
inline void merge(const State& into, const State& later, int64_t rows, int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    if (later.best[r] == kNever && later.total[r] == 0.0f) continue;
    const float best = std::max(into.best[r], later.best[r]);
    const float a = into.best[r] == kNever ? 0.0f : exp1(into.best[r] - best);
    const float b = exp1(later.best[r] - best);
    into.best[r] = best;
    into.total[r] = into.total[r] * a + later.total[r] * b;
    const Lanes first = broadcast(a), second = broadcast(b);
    for (int64_t d = r * padded; d < (r + 1) * padded; d += 8) {
      const Lanes old = _mm256_mul_ps(load(into.values + d), first);
      store(into.values + d, fma(load(later.values + d), second, old));
    }
  }
}

}  // namespace octavo
