// Which experts a token goes to and what they weigh: `RoutingRule` of kernels/routing.py.
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "native.h"
#include "simd.h"

namespace octavo {

// The orders are those of native.py.
enum Score : int64_t { SOFTMAX, SIGMOID, SQRT_SOFTPLUS, LOGIT };
enum Weighting : int64_t { BY_SCORE, BY_SOFTMAX, BY_SIGMOID };

// correction and scales: [experts], or null; counts: [experts] that the picks are added to, or null.
struct Route {
  const float *logits, *correction, *scales;
  float* weights;
  int32_t* ids;
  int64_t tokens, experts, top_k, score, groups, top_groups, group_best, weighting, renormalize;
  double sum_epsilon, least_sum, scale;
  int64_t* counts;
};

namespace {

constexpr int64_t kTokenGrain = 16;

// scores = e^(logits - highest), in whole lanes; returns their sum. scores has room for 8 more.
float exponentials(const float* logits, int64_t count, float* scores) {
  float highest = logits[0];
  for (int64_t e = 1; e < count; ++e) highest = std::max(highest, logits[e]);
  Lanes lanes = zeros();
  for (int64_t e = 0; e < count; e += 8) {
    const int64_t left = std::min<int64_t>(8, count - e);
    const Lanes x = left == 8 ? load(logits + e) : load_some(logits + e, left);
    Lanes v = exp(_mm256_sub_ps(x, broadcast(highest)));
    if (left < 8) v = _mm256_and_ps(v, _mm256_castsi256_ps(first_lanes(left)));
    store(scores + e, v);
    lanes = _mm256_add_ps(lanes, v);
  }
  return sum(lanes);
}

void softmax(const float* logits, int64_t count, float* scores) {
  const float total = exponentials(logits, count, scores);
  for (int64_t e = 0; e < count; ++e) scores[e] /= total;
}

float sigmoid1(float x) { return _mm256_cvtss_f32(sigmoid(broadcast(x))); }

void score_row(int64_t score, const float* logits, int64_t count, float* scores) {
  if (score == SOFTMAX) {
    softmax(logits, count, scores);
    return;
  }
  for (int64_t e = 0; e < count; ++e) {
    const float x = logits[e];
    // as in torch, softplus is x itself above 20
    const float plus = score != SQRT_SOFTPLUS || x > 20.0f ? x : std::log1p(std::exp(x));
    scores[e] = score == SIGMOID ? sigmoid1(x) : score == SQRT_SOFTPLUS ? std::sqrt(plus) : x;
  }
}

// The first of the best entries that are not taken; NaN is below all, as `>` has it.
int64_t best_of(const float* values, const bool* taken, int64_t first, int64_t end) {
  int64_t best = -1;
  for (int64_t e = first; e < end; ++e) {
    if (!taken[e] && (best < 0 || values[e] > values[best])) best = e;
  }
  return best;
}

// Takes away the experts of all but the best groups.
void keep_groups(const Route& r, const float* choice, bool* taken, float* group, bool* chosen) {
  const int64_t size = r.experts / r.groups;
  for (int64_t g = 0; g < r.groups; ++g) {
    const int64_t first = g * size, end = first + size;
    const int64_t best = best_of(choice, taken, first, end);
    group[g] = choice[best];
    if (r.group_best > 1) {
      taken[best] = true;
      group[g] += choice[best_of(choice, taken, first, end)];
      taken[best] = false;
    }
    chosen[g] = false;
  }
  for (int64_t j = 0; j < r.top_groups; ++j) chosen[best_of(group, chosen, 0, r.groups)] = true;
  for (int64_t e = 0; e < r.experts; ++e) taken[e] = !chosen[e / size];
}

void weigh(const Route& r, const float* logits, const float* scores, const int32_t* ids,
           float* scratch, float* weights) {
  for (int64_t j = 0; j < r.top_k; ++j) {
    const float x = logits[ids[j]];
    weights[j] = r.weighting == BY_SCORE ? scores[ids[j]]
                 : r.weighting == BY_SIGMOID ? sigmoid1(x)
                                             : x;
  }
  if (r.weighting == BY_SOFTMAX) {
    softmax(weights, r.top_k, scratch);
    std::copy(scratch, scratch + r.top_k, weights);
  }
  if (r.renormalize) {
    float total = 0.0f;
    for (int64_t j = 0; j < r.top_k; ++j) total += weights[j];
    total = std::max(total + static_cast<float>(r.sum_epsilon), static_cast<float>(r.least_sum));
    for (int64_t j = 0; j < r.top_k; ++j) weights[j] /= total;
  }
  for (int64_t j = 0; j < r.top_k; ++j) {
    if (r.scale != 1.0) weights[j] *= static_cast<float>(r.scale);
    if (r.scales != nullptr) weights[j] *= r.scales[ids[j]];
  }
}

void route_row(const Route& r, int64_t t, Scratch& scratch) {
  const float* logits = r.logits + t * r.experts;
  float* weights = r.weights + t * r.top_k;
  int32_t* ids = r.ids + t * r.top_k;
  const int64_t room = r.experts + 8;
  float *scores = scratch.floats(0, 4 * room), *choice = scores, *group = scores + 2 * room;
  // bytes of the last part: taken experts, then chosen groups
  bool *taken = reinterpret_cast<bool*>(scores + 3 * room), *chosen = taken + r.experts;
  score_row(r.score, logits, r.experts, scores);
  if (r.correction != nullptr) {
    choice = scores + room;
    for (int64_t e = 0; e < r.experts; ++e) choice[e] = scores[e] + r.correction[e];
  }
  std::fill(taken, taken + r.experts, false);
  if (r.groups > 1) keep_groups(r, choice, taken, group, chosen);
  for (int64_t j = 0; j < r.top_k; ++j) {
    const int64_t best = best_of(choice, taken, 0, r.experts);
    taken[best] = true;
    ids[j] = static_cast<int32_t>(best);
  }
  weigh(r, logits, scores, ids, group, weights);
}

}  // namespace

OCTAVO_API int64_t octavo_route(Pool* pool, const Route* args) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const Route& r = *args;
  pool->run(r.tokens, kTokenGrain, [&](int64_t t, Scratch& scratch) { route_row(r, t, scratch); });
  if (r.counts != nullptr) {
    for (int64_t i = 0; i < r.tokens * r.top_k; ++i) ++r.counts[r.ids[i]];
  }
  return OK;
}

}  // namespace octavo
