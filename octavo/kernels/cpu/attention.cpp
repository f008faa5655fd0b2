// Paged causal attention: softmax(scale * q k^T + mask) v, by online softmax over tiles.
//
// Keys are cut at absolute positions into splits of kSplit tokens and tiles of kTile. A query meets
// the tiles of a split in order, from a fresh state, and the splits' states are merged in order. So
// a query's result is the same bits however the prompt was chunked, whoever else is in the batch,
// and whether one thread computed all splits or several did. Slots that no query of a work item
// may see are never read.
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "product.h"
#include "simd.h"

namespace octavo {

namespace {

constexpr int64_t kTile = 64, kSplit = 256;
constexpr int64_t kRows = 64;  // query rows (queries x query heads of a kv head) of a work item
constexpr float kNever = -std::numeric_limits<float>::infinity();

// Consecutive queries of one sequence, for one kv head, over the splits [split_begin, split_end).
// partial: the place of the state of an item of one split, to be merged with others; -1: none.
struct Item {
  int64_t sequence, kv_head, query_begin, query_end, split_begin, split_end, partial;
};

// Running softmax of some rows: their maximum, sum of exponentials and weighted values.
struct State {
  float *best, *total, *values;
};

struct Job {
  const float* q;
  float* out;
  const KVLayer& layer;
  const AttentionBatch& batch;
  int64_t heads, window, group, padded;  // window 0: none; padded: head_size in whole lanes
  float scale;
  float* partials;
  int64_t partial_floats;

  int64_t first_seen(int64_t position) const {
    return window ? std::max<int64_t>(0, position - window + 1) : 0;
  }
  int64_t state_floats(int64_t rows) const { return rows * (padded + 2); }
};

State state_at(float* base, int64_t rows) { return {base, base + rows, base + 2 * rows}; }

// The tokens [begin, end) of a tile, as rows of float32: in place if possible, else converted.
void gather(const Job& job, const uint8_t* pages, int64_t page_stride, const Item& item,
            int64_t begin, int64_t end, float* converted, const float** rows) {
  const KVLayer& layer = job.layer;
  const int64_t size = layer.head_size, bytes = layer.format == F32 ? 4 : 2;
  const int32_t* table = job.batch.block_table + item.sequence * job.batch.table_stride;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t block = table[at / layer.block_size], offset = at % layer.block_size;
    const uint8_t* from = pages + block * page_stride +
                          (offset * layer.kv_heads + item.kv_head) * size * bytes;
    if (layer.format == F32 && size == job.padded) {
      rows[at - begin] = reinterpret_cast<const float*>(from);
      continue;
    }
    float* to = converted + (at - begin) * job.padded;
    const Matrix token = {from, 1, size, size * bytes, layer.format};
    unpack_row(token, 0, to);
    std::fill(to + size, to + job.padded, 0.0f);
    rows[at - begin] = to;
  }
}

// Scores of one row become probabilities relative to the new maximum; returns the old state's
// factor. Columns outside [begin, end) become 0.
float soften(float* scores, int64_t begin, int64_t end, float& best, float& total) {
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

// values[m] = values[m] * factors[m] + sum over j of scores[m][j] * v[j], N lanes wide.
template <int M, int N>
inline void weigh(const float* scores, const float* factors, const float* const* v, int64_t offset,
                  int64_t count, float* values, int64_t stride) {
  Lanes acc[M][N];
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      acc[m][n] = _mm256_mul_ps(load(values + m * stride + 8 * n), broadcast(factors[m]));
    }
  }
  for (int64_t j = 0; j < count; ++j) {
    Lanes u[N];
    for (int n = 0; n < N; ++n) u[n] = load(v[j] + offset + 8 * n);
    for (int m = 0; m < M; ++m) {
      const Lanes p = broadcast(scores[m * kTile + j]);
      for (int n = 0; n < N; ++n) acc[m][n] = fma(p, u[n], acc[m][n]);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) store(values + m * stride + 8 * n, acc[m][n]);
  }
}

template <int M>
void weigh_rows(const float* scores, const float* factors, const float* const* v, int64_t count,
                float* values, int64_t size) {
  int64_t d = 0;
  for (; d + 16 <= size; d += 16) weigh<M, 2>(scores, factors, v, d, count, values + d, size);
  for (; d < size; d += 8) weigh<M, 1>(scores, factors, v, d, count, values + d, size);
}

// Buffers of one work item, from the thread's scratch.
struct Work {
  float *q, *scores, *keys, *values, *factors;
  State split, merged;
};

// Folds the tile's tokens [begin, end), all seen by some query of the item, into the split's state.
void fold_tile(const Job& job, const Item& item, int64_t rows, int64_t begin, int64_t end,
               const Work& work) {
  const int64_t tile = begin / kTile * kTile, count = end - begin, padded = job.padded;
  const float *k[kTile], *v[kTile], *q[kRows];
  gather(job, job.layer.key, job.layer.key_stride, item, begin, end, work.keys, k);
  gather(job, job.layer.value, job.layer.value_stride, item, begin, end, work.values, v);
  float* scores = work.scores + (begin - tile);
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t some = std::min(kRows, rows - r);
    for (int64_t i = 0; i < some; ++i) q[i] = work.q + (r + i) * padded;
    dot_products(q, some, k, count, padded, scores + r * kTile, kTile);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = job.batch.positions[item.query_begin + r / job.group];
    const int64_t seen = std::max(begin, job.first_seen(position));
    const int64_t seen_end = std::min(end, position + 1);
    float* row = work.scores + r * kTile;
    work.factors[r] = 1.0f;
    if (seen < seen_end) {
      work.factors[r] = soften(row, seen - tile, seen_end - tile, work.split.best[r],
                               work.split.total[r]);
    } else {
      std::fill(row, row + kTile, 0.0f);
    }
  }
  for (int64_t r = 0; r < rows; r += 4) {
    float* values = work.split.values + r * padded;
    const float* factors = work.factors + r;
    const float* p = scores + r * kTile;
    switch (std::min<int64_t>(4, rows - r)) {
      case 4: weigh_rows<4>(p, factors, v, count, values, padded); break;
      case 3: weigh_rows<3>(p, factors, v, count, values, padded); break;
      case 2: weigh_rows<2>(p, factors, v, count, values, padded); break;
      case 1: weigh_rows<1>(p, factors, v, count, values, padded); break;
    }
  }
}

void clear(const State& state, int64_t rows, int64_t padded) {
  std::fill(state.best, state.best + rows, kNever);
  std::fill(state.total, state.total + rows, 0.0f);
  std::fill(state.values, state.values + rows * padded, 0.0f);
}

// into = into (earlier tokens) joined with `later`; a state that saw nothing changes nothing.
void merge(const State& into, const State& later, int64_t rows, int64_t padded) {
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

void write_out(const Job& job, const Item& item, const State& state) {
  const int64_t rows = (item.query_end - item.query_begin) * job.group;
  const int64_t size = job.layer.head_size;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = item.query_begin + r / job.group;
    const int64_t head = item.kv_head * job.group + r % job.group;
    float* to = job.out + (t * job.heads + head) * size;
    const float* from = state.values + r * job.padded;
    for (int64_t d = 0; d < size; ++d) to[d] = from[d] / state.total[r];
  }
}

void run_item(const Job& job, const Item& item, Scratch& scratch) {
  const int64_t queries = item.query_end - item.query_begin, rows = queries * job.group;
  const int64_t padded = job.padded, size = job.layer.head_size;
  const int64_t state = job.state_floats(rows);
  float* states = scratch.floats(4, 2 * state);
  float* tiles = scratch.floats(5, 2 * kTile * padded);
  Work work = {scratch.floats(2, rows * padded), scratch.floats(3, rows * kTile), tiles,
               tiles + kTile * padded, scratch.floats(6, rows), state_at(states, rows),
               state_at(states + state, rows)};
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = item.query_begin + r / job.group;
    const int64_t head = item.kv_head * job.group + r % job.group;
    const float* from = job.q + (t * job.heads + head) * size;
    float* to = work.q + r * padded;
    for (int64_t d = 0; d < padded; ++d) to[d] = d < size ? from[d] * job.scale : 0.0f;
  }
  const int64_t last = job.batch.positions[item.query_end - 1];
  const int64_t first = job.first_seen(job.batch.positions[item.query_begin]);
  clear(work.merged, rows, padded);
  for (int64_t split = item.split_begin; split < item.split_end; ++split) {
    clear(work.split, rows, padded);
    const int64_t split_end = std::min((split + 1) * kSplit, last + 1);
    int64_t begin = std::max(split * kSplit, first);
    while (begin < split_end) {
      const int64_t end = std::min((begin / kTile + 1) * kTile, split_end);
      fold_tile(job, item, rows, begin, end, work);
      begin = end;
    }
    if (item.partial < 0) {
      merge(work.merged, work.split, rows, padded);
    } else {
      std::copy(states, states + state, job.partials + item.partial * job.partial_floats);
    }
  }
  if (item.partial < 0) write_out(job, item, work.merged);
}

// The items of one sequence, in order of kv head and query; whole in their splits.
void add_items(const Job& job, int64_t sequence, std::vector<Item>& items) {
  const AttentionBatch& batch = job.batch;
  const int64_t tile = std::max<int64_t>(1, kRows / job.group);
  const int64_t begin = batch.query_starts[sequence], end = batch.query_starts[sequence + 1];
  for (int64_t kv_head = 0; kv_head < job.layer.kv_heads; ++kv_head) {
    for (int64_t t = begin; t < end; t += tile) {
      const int64_t stop = std::min(t + tile, end);
      const int64_t from = job.first_seen(batch.positions[t]) / kSplit;
      items.push_back({sequence, kv_head, t, stop, from, batch.positions[stop - 1] / kSplit + 1, -1});
    }
  }
}

// Whether every position and block that the work will touch exists.
bool is_valid(const Job& job) {
  const AttentionBatch& batch = job.batch;
  const int64_t block_size = job.layer.block_size;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t begin = batch.query_starts[s], end = batch.query_starts[s + 1];
    const int64_t seq_len = batch.seq_lens[s];
    if (begin < 0 || begin > end || end > batch.tokens) return false;
    if (begin == end) continue;
    if (seq_len > batch.table_columns * block_size) return false;
    for (int64_t t = begin; t < end; ++t) {
      if (batch.positions[t] != seq_len - end + t || batch.positions[t] < 0) return false;
    }
    const int32_t* table = batch.block_table + s * batch.table_stride;
    const int64_t first = job.first_seen(batch.positions[begin]) / block_size;
    for (int64_t column = first; column * block_size < seq_len; ++column) {
      if (table[column] < 0 || table[column] >= job.layer.blocks) return false;
    }
  }
  return true;
}

// Few long queries: every split becomes its own item, and the states are merged afterwards.
void run_split(Pool* pool, Job job, const std::vector<Item>& whole) {
  std::vector<Item> items;
  std::vector<int64_t> starts;
  int64_t most_rows = 0;
  for (const Item& item : whole) {
    starts.push_back(static_cast<int64_t>(items.size()));
    most_rows = std::max(most_rows, (item.query_end - item.query_begin) * job.group);
    for (int64_t split = item.split_begin; split < item.split_end; ++split) {
      Item part = item;
      part.split_begin = split;
      part.split_end = split + 1;
      part.partial = static_cast<int64_t>(items.size());
      items.push_back(part);
    }
  }
  job.partial_floats = job.state_floats(most_rows);
  std::vector<float> partials(items.size() * job.partial_floats);
  job.partials = partials.data();
  pool->run(static_cast<int64_t>(items.size()), 1,
            [&](int64_t i, Scratch& scratch) { run_item(job, items[i], scratch); });
  for (size_t w = 0; w < whole.size(); ++w) {
    const Item& item = whole[w];
    const int64_t rows = (item.query_end - item.query_begin) * job.group;
    std::vector<float> floats(job.state_floats(rows));
    const State merged = state_at(floats.data(), rows);
    clear(merged, rows, job.padded);
    for (int64_t i = 0; i < item.split_end - item.split_begin; ++i) {
      float* part = partials.data() + (starts[w] + i) * job.partial_floats;
      merge(merged, state_at(part, rows), rows, job.padded);
    }
    write_out(job, item, merged);
  }
}

}  // namespace

// q and out are [tokens][heads][head_size]; window 0 means none.
OCTAVO_API int64_t octavo_attention(Pool* pool, const float* q, int64_t heads, const KVLayer* layer,
                                    const AttentionBatch* batch, double scale, int64_t window,
                                    float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const int64_t padded = (layer->head_size + 7) / 8 * 8;
  const Job job = {q,      out, *layer, *batch, heads, window, heads / layer->kv_heads,
                   padded, static_cast<float>(scale), nullptr, 0};
  if (!is_valid(job)) return BAD_INDEX;
  std::vector<Item> items;
  for (int64_t s = 0; s < batch->sequences; ++s) add_items(job, s, items);
  const int64_t total = static_cast<int64_t>(items.size());
  int64_t most_splits = 0;
  for (const Item& item : items) {
    most_splits = std::max(most_splits, item.split_end - item.split_begin);
  }
  if (pool->threads() > 1 && most_splits > 1 && total < 8 * pool->threads()) {
    run_split(pool, job, items);
    return OK;
  }
  // Later queries see more keys: the long items first.
  pool->run(total, 1, [&](int64_t i, Scratch& scratch) {
    run_item(job, items[total - 1 - i], scratch);
  });
  return OK;
}

}  // namespace octavo
