// Ops that are matrix products: linear, gated MLP, mixture of experts, embedding.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "product.h"
#include "simd.h"

namespace octavo {

namespace {

// Panels that make it worth waking another thread.
int64_t least_of(const Products& multiply, const Matrix& w, int64_t tokens) {
  const int64_t panel_work = w.row_bytes * multiply.panel_rows * (tokens < 4 ? 1 : tokens / 4);
  return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(panel_work, 1));
}

struct Silu {
  static Lanes of(Lanes v) { return _mm256_mul_ps(v, sigmoid(v)); }
};
struct GeluTanh {
  // 0.5 v (1 + tanh(u)) = v sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3)
  static Lanes of(Lanes v) {
    const Lanes cube = _mm256_mul_ps(_mm256_mul_ps(v, v), v);
    const Lanes u = fma(cube, broadcast(0.044715f), v);
    return _mm256_mul_ps(v, sigmoid(_mm256_mul_ps(u, broadcast(1.5957691216f))));
  }
};

template <class Act>
void activate_and_multiply(float* gate, const float* up, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    store(gate + i, _mm256_mul_ps(Act::of(load(gate + i)), load(up + i)));
  }
  if (const int64_t left = count - i; left > 0) {
    const Lanes v = _mm256_mul_ps(Act::of(load_some(gate + i, left)), load_some(up + i, left));
    store_some(gate + i, left, v);
  }
}

Lanes clamped_swiglu(Lanes gate, Lanes up, const Activation& activation) {
  const Lanes limit = broadcast(static_cast<float>(activation.limit));
  const Lanes alpha = broadcast(static_cast<float>(activation.alpha));
  // A NaN is the second operand, which min and max return then.
  const Lanes g = _mm256_min_ps(limit, gate);
  const Lanes u = _mm256_min_ps(limit, _mm256_max_ps(_mm256_sub_ps(zeros(), limit), up));
  const Lanes act = _mm256_mul_ps(g, sigmoid(_mm256_mul_ps(alpha, g)));
  return _mm256_mul_ps(act, _mm256_add_ps(u, broadcast(1.0f)));
}

void activate_row(const Activation& activation, float* gate, const float* up, int64_t count) {
  if (activation.kind == SILU) return activate_and_multiply<Silu>(gate, up, count);
  if (activation.kind == GELU_TANH) return activate_and_multiply<GeluTanh>(gate, up, count);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    store(gate + i, clamped_swiglu(load(gate + i), load(up + i), activation));
  }
  if (const int64_t left = count - i; left > 0) {
    const Lanes g = load_some(gate + i, left), u = load_some(up + i, left);
    store_some(gate + i, left, clamped_swiglu(g, u, activation));
  }
}

void add_bias(float* row, const float* bias, int64_t count) {
  for (int64_t n = 0; bias != nullptr && n < count; ++n) row[n] += bias[n];
}

// The first product of a gated MLP: matrices, biases [rows] or null.
struct GateUp {
  const Products& multiply;
  const Matrix *gate, *up;
  const float *gate_bias, *up_bias;
  const Activation& activation;
};

inline const float* at(const float* bias, int64_t index) {
  return bias == nullptr ? nullptr : bias + index;
}

// hidden[t, first + n] = act(x @ gate.T, x @ up.T) for one panel of rows.
void gate_and_up(const Rows& x, int64_t tokens, const GateUp& of, int64_t first, float* hidden,
                 Scratch& scratch) {
  const int64_t width = of.gate->rows, most = of.multiply.panel_rows;
  const int64_t count = std::min(most, width - first);
  float* up_out = scratch.floats(2, tokens * most);
  of.multiply(x, tokens, *of.gate, first, count, hidden + first, width, scratch);
  of.multiply(x, tokens, *of.up, first, count, up_out, most, scratch);
  for (int64_t t = 0; t < tokens; ++t) {
    float *row = hidden + t * width + first, *factor = up_out + t * most;
    add_bias(row, at(of.gate_bias, first), count);
    add_bias(factor, at(of.up_bias, first), count);
    activate_row(of.activation, row, factor, count);
  }
}

}  // namespace

OCTAVO_API int64_t octavo_linear(Pool* pool, const float* x, int64_t tokens, const Matrix* weights,
                                 int64_t num_weights, const float* bias, float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const Products multiply = products_of(*pool);
  const int64_t most = multiply.panel_rows;
  int64_t total = 0, columns = 0;
  for (int64_t i = 0; i < num_weights; ++i) {
    total += multiply.panels(weights[i].rows);
    columns += weights[i].rows;
  }
  const Rows rows = rows_of(pool, x, tokens, weights, num_weights);
  pool->share(total, least_of(multiply, weights[0], tokens), [&](int64_t index, Scratch& scratch) {
    const Matrix* w = weights;
    int64_t column = 0;
    while (index >= multiply.panels(w->rows)) {
      index -= multiply.panels(w->rows);
      column += w->rows;
      ++w;
    }
    const int64_t first = index * most, count = std::min(most, w->rows - first);
    float* to = out + column + first;
    multiply(rows, tokens, *w, first, count, to, columns, scratch);
    if (bias != nullptr) {
      for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t n = 0; n < count; ++n) to[t * columns + n] += bias[column + first + n];
      }
    }
  });
  return OK;
}

// weights: gate, up, down. hidden: room for tokens x gate.rows.
OCTAVO_API int64_t octavo_gated_mlp(Pool* pool, const float* x, int64_t tokens,
                                    const Matrix* weights, const Activation* activation,
                                    float* hidden, float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const Products multiply = products_of(*pool);
  const int64_t most = multiply.panel_rows;
  const Matrix &gate = weights[0], &up = weights[1], &down = weights[2];
  const Rows rows = rows_of(pool, x, tokens, weights, 2);
  const int64_t total = multiply.panels(gate.rows), down_total = multiply.panels(down.rows);
  pool->share(total, least_of(multiply, gate, tokens), [&](int64_t i, Scratch& s) {
    const GateUp of = {multiply, &gate, &up, nullptr, nullptr, *activation};
    gate_and_up(rows, tokens, of, i * most, hidden, s);
  });
  const Rows inner = rows_of(pool, hidden, tokens, &down, 1);
  pool->share(down_total, least_of(multiply, down, tokens), [&](int64_t i, Scratch& s) {
    const int64_t first = i * most, count = std::min(most, down.rows - first);
    multiply(inner, tokens, down, first, count, out + first, down.rows, s);
  });
  return OK;
}

// weights: gate of every expert, then up, then down. Biases of all experts, or null. Picks are (token, place) pairs; `order` and
// `slots` have room for one int32 a pick, hidden and parts for one row a pick.
struct MoeArgs {
  const float* x;
  const Matrix* weights;
  const float* topk_weights;
  const int32_t* topk_ids;
  int32_t *order, *slots;
  float *hidden, *parts, *out;
  int64_t tokens, experts, top_k;
  const float *gate_bias, *up_bias, *down_bias;
  Activation activation;
};

OCTAVO_API int64_t octavo_moe(Pool* pool, const MoeArgs* args) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const Products multiply = products_of(*pool);
  const int64_t most = multiply.panel_rows;
  const MoeArgs& a = *args;
  const Matrix *gates = a.weights, *ups = gates + a.experts, *downs = ups + a.experts;
  const int64_t picks = a.tokens * a.top_k, inner = gates[0].rows, outer = downs[0].rows;
  std::vector<int64_t> starts(a.experts + 1, 0);
  for (int64_t i = 0; i < picks; ++i) {
    if (a.topk_ids[i] < -1 || a.topk_ids[i] >= a.experts) return BAD_INDEX;
    if (a.topk_ids[i] >= 0) ++starts[a.topk_ids[i] + 1];
  }
  for (int64_t e = 0; e < a.experts; ++e) starts[e + 1] += starts[e];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1), active;
  for (int64_t i = 0; i < picks; ++i) {
    const int64_t slot = a.topk_ids[i] < 0 ? -1 : next[a.topk_ids[i]]++;
    a.slots[i] = static_cast<int32_t>(slot);
    if (slot < 0) continue;  // an expert that is not here
    a.order[slot] = static_cast<int32_t>(i / a.top_k);
  }
  for (int64_t e = 0; e < a.experts; ++e) {
    if (starts[e + 1] > starts[e]) active.push_back(e);
  }
  const int64_t width = multiply.panels(inner), down_width = multiply.panels(outer);
  const int64_t num_active = static_cast<int64_t>(active.size()), per = picks / std::max<int64_t>(num_active, 1);
  const Rows input = rows_of(pool, a.x, a.tokens, gates, 2 * a.experts);
  pool->share(num_active * width, least_of(multiply, gates[0], per), [&](int64_t i, Scratch& s) {
    const int64_t e = active[i / width], start = starts[e];
    const Rows rows = input.through(a.order + start);
    const GateUp of = {multiply, &gates[e], &ups[e], at(a.gate_bias, e * inner),
                       at(a.up_bias, e * inner), a.activation};
    gate_and_up(rows, starts[e + 1] - start, of, i % width * most, a.hidden + start * inner,
                s);
  });
  const Rows middle = rows_of(pool, a.hidden, starts[a.experts], downs, a.experts);
  const int64_t down_total = num_active * down_width;
  pool->share(down_total, least_of(multiply, downs[0], per), [&](int64_t i, Scratch& s) {
    const int64_t e = active[i / down_width], start = starts[e];
    const int64_t first = i % down_width * most, count = std::min(most, outer - first);
    float* to = a.parts + start * outer + first;
    multiply(middle.from(start), starts[e + 1] - start, downs[e], first, count, to, outer, s);
    for (int64_t t = 0; t < starts[e + 1] - start; ++t) {
      add_bias(to + t * outer, at(a.down_bias, e * outer + first), count);
    }
  });
  pool->run(a.tokens, 8, [&](int64_t t, Scratch&) {
    float* to = a.out + t * outer;
    for (int64_t j = 0; j < a.top_k; ++j) {
      const int32_t slot = a.slots[t * a.top_k + j];
      if (slot < 0) {
        if (j == 0) std::fill_n(to, outer, 0.0f);
        continue;
      }
      const float* part = a.parts + slot * outer;
      const float weight = a.topk_weights[t * a.top_k + j];
      for (int64_t m = 0; m < outer; ++m) {
        to[m] = j == 0 ? part[m] * weight : to[m] + part[m] * weight;
      }
    }
  });
  return OK;
}

OCTAVO_API int64_t octavo_embedding(Pool* pool, const int32_t* token_ids, int64_t tokens,
                                    const Matrix* weight, float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  for (int64_t t = 0; t < tokens; ++t) {
    if (token_ids[t] < 0 || token_ids[t] >= weight->rows) return BAD_INDEX;
  }
  pool->run(tokens, 16, [&](int64_t t, Scratch&) {
    unpack_row(*weight, token_ids[t], out + t * weight->cols);
  });
  return OK;
}

}  // namespace octavo
