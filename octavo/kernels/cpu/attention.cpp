// Paged causal attention: softmax(cap(scale * q k^T) + mask) v with sinks, by online softmax over
// tiles.
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
#include <type_traits>
#include <vector>

#include "kv_pages.h"
#include "product.h"
#include "softmax.h"
#include "tiles.h"

namespace octavo {

namespace {

constexpr int64_t kSplit = 256;
constexpr int64_t kRows = 64;  // query rows (queries x query heads of a kv head) of a work item

// Consecutive queries of one sequence, for some kv heads, over splits [split_begin, split_end).
// partial: the place of the states of an item of one split, to be merged with others; -1: none.
struct Item {
  int64_t sequence, head_begin, head_end, query_begin, query_end, split_begin, split_end, partial;

  int64_t queries() const { return query_end - query_begin; }
};

struct Job {
  const float* q;
  float* out;
  const KVLayer& layer;
  const AttentionBatch& batch;
  const AttentionOp& op;
  int64_t heads, group, padded;  // padded: head_size in whole lanes
  bool is_wide;  // in AVX-512 where rows are many and vectors float32: the same bits
  float* partials;
  int64_t partial_floats;

  int64_t first_seen(int64_t position) const {
    switch (op.visibility) {
      case WINDOW: return std::max<int64_t>(0, position - op.visible_size + 1);
      case CHUNK: return position / op.visible_size * op.visible_size;
      default: return 0;
    }
  }
  int64_t state_floats(int64_t rows) const { return rows * (padded + 2); }
};

// What one work item reads, and its buffers from the thread's scratch.
struct Work {
  Vectors keys, values;
  int64_t rows, state;                      // of one kv head: query rows, floats of a state
  float *q, *states;                        // by kv head: rows, and the states of split and whole
  float *scores, *copies, *factors, *scales;  // of one tile

  State split(int64_t head) const { return state_at(states + 2 * head * state, rows); }
  State whole(int64_t head) const { return state_at(states + (2 * head + 1) * state, rows); }
};

// Returns the scales of one tile's vectors by column, what their numbers lack of them included; null
// where numbers have none.
template <class F>
const float* column_scales(const Vectors& from, const Tokens& now, const Work& work) {
  if constexpr (std::is_same_v<F, FormatFP8> || std::is_same_v<F, FormatInt8>) {
    std::fill(work.scales, work.scales + kTile, 0.0f);
    float* to = work.scales + now.begin % kTile;
    for_each_vector(from.scales, now, [&](int64_t i, const uint8_t* at) {
      to[i] = scale_at(at, 0) * F::kFactor;
    });
    return work.scales;
  }
  return nullptr;
}

void scale_columns(float* row, const float* scales) {
  for (int64_t j = 0; j < kTile; j += 8) {
    store(row + j, _mm256_mul_ps(load(row + j), load(scales + j)));
  }
}

constexpr int64_t kWideRows = 2;  // and more fill wide tiles

// out[m * kTile + n] = q[m] . k[n] for the tokens of one tile.
template <class F>
void dot_tokens(const Job& job, const float* const* q, int64_t rows, const uint8_t* const* k,
                int64_t count, float* out, Coming& coming) {
  int64_t n = 0;
  if (std::is_same_v<F, FormatF32> && job.is_wide && rows >= kWideRows) {
    for (; n + kWideKeys <= count; n += kWideKeys) {
      coming.ask(kWideKeys);
      score_avx512(q, rows, k + n, job.padded, out + n, kTile);
    }
  }
  dot_products<F>(q, rows, k + n, count - n, job.padded, out + n, kTile, coming);
}

// Scores of all rows with one tile's tokens, softened; columns outside the tile's part become 0.
template <class F>
void score(const Job& job, const Item& item, const Tokens& now, const uint8_t* const* k,
           const float* scales, Coming& coming, const Work& work) {
  const int64_t begin = now.begin, end = begin + now.count, tile = begin / kTile * kTile;
  const int64_t head = now.head - item.head_begin, rows = work.rows;
  const State split = work.split(head);
  const float* q[kRows];
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t some = std::min(kRows, rows - r);
    for (int64_t i = 0; i < some; ++i) q[i] = work.q + (head * rows + r + i) * job.padded;
    float* to = work.scores + r * kTile + (begin - tile);
    dot_tokens<F>(job, q, some, k, now.count, to, coming);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t position = job.batch.positions[item.query_begin + r / job.group];
    const int64_t seen = std::max(begin, job.first_seen(position));
    const int64_t seen_end = std::min(end, position + 1);
    float* row = work.scores + r * kTile;
    work.factors[r] = 1.0f;
    if (seen < seen_end) {
      if (scales != nullptr) scale_columns(row, scales);
      if (job.op.soft_cap != 0.0) cap_scores(row, static_cast<float>(job.op.soft_cap));
      float &best = split.best[r], &total = split.total[r];
      const int64_t from = seen - tile, to = seen_end - tile;
      work.factors[r] = job.is_wide ? soften_avx512(row, kTile, from, to, best, total)
                                    : soften(row, from, to, best, total);
    } else {
      std::fill(row, row + kTile, 0.0f);
    }
  }
}

template <class F>
void weigh(const Job& job, const Item& item, const Tokens& now, const uint8_t* const* v,
           const float* scales, Coming& coming, const Work& work) {
  const State split = work.split(now.head - item.head_begin);
  if (scales != nullptr) {
    for (int64_t r = 0; r < work.rows; ++r) scale_columns(work.scores + r * kTile, scales);
  }
  const float* scores = work.scores + now.begin % kTile;
  for (int64_t r = 0; r < work.rows; r += 4) {
    const Weighing w = {scores + r * kTile, work.factors + r, kTile, v, now.count,
                        split.values + r * job.padded, job.padded};
    if (std::is_same_v<F, FormatF32> && job.is_wide && work.rows - r >= kWideRows &&
        job.padded % 16 == 0) {
      coming.ask(4 * now.count / work.rows + 1);
      weigh_avx512(w, std::min<int64_t>(4, work.rows - r));
      continue;
    }
    switch (work.rows - r) {
      case 1: weigh_rows<F, 1>(w, coming); break;
      case 2: weigh_rows<F, 2>(w, coming); break;
      case 3: weigh_rows<F, 3>(w, coming); break;
      default: weigh_rows<F, 4>(w, coming); break;
    }
  }
}

// Calls use(F{}, scales) when `rows`, the vectors of one tile, can be read as F: few query rows
// widen narrow numbers as they read them, many share float32 copies. Either way numbers with one
// scale are read without it, so that rows do not depend on how many there are.
template <class Use>
void with_vectors(const Job& job, const Vectors& from, const Tokens& now, const uint8_t** rows,
                  const Work& work, const Use& use) {
  if (from.is_expanded()) {
    expand(from, now, rows, job.padded, work.copies);
    return use(FormatF32{}, nullptr);
  }
  with_kv_format(from.format, [&](auto stored) {
    using F = decltype(stored);
    const float* scales = column_scales<F>(from, now, work);
    if (from.size == job.padded && (std::is_same_v<F, FormatF32> || work.rows <= 4)) {
      return use(stored, scales);
    }
    convert<F>(rows, now.count, from.size, job.padded, work.copies);
    use(FormatF32{}, scales);
  });
}

// Folds the tile's tokens `now`, all seen by some query of the item, into the split's state.
void fold_tile(const Job& job, const Item& item, const Tokens& now, const Tokens& next,
               const Work& work) {
  const uint8_t *k[kTile], *v[kTile];
  for_each_vector(work.keys.numbers, now, [&](int64_t i, const uint8_t* at) { k[i] = at; });
  for_each_vector(work.values.numbers, now, [&](int64_t i, const uint8_t* at) { v[i] = at; });
  Coming keys_ahead(work.keys.numbers, next), values_ahead(work.values.numbers, next);
  with_vectors(job, work.keys, now, k, work, [&](auto format, const float* scales) {
    score<decltype(format)>(job, item, now, k, scales, keys_ahead, work);
  });
  with_vectors(job, work.values, now, v, work, [&](auto format, const float* scales) {
    weigh<decltype(format)>(job, item, now, v, scales, values_ahead, work);
  });
}

// The state of queries that have met no key: a sink is a score without a value.
void meet_none(const Job& job, int64_t head, const State& state, int64_t rows) {
  clear(state, rows, job.padded);
  if (job.op.sinks == nullptr) return;
  for (int64_t r = 0; r < rows; ++r) {
    const float sink = job.op.sinks[head * job.group + r % job.group];
    state.best[r] = sink;
    state.total[r] = sink == kNever ? 0.0f : 1.0f;
  }
}

void write_out(const Job& job, const Item& item, int64_t head, const State& state) {
  const int64_t rows = item.queries() * job.group, size = job.layer.head_size;
  const int64_t first = job.layer.first_part;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t t = item.query_begin + r / job.group;
    float* to = job.out + (t * job.heads + head * job.group + r % job.group) * size;
    const float* from = state.values + r * job.padded;
    for (int64_t d = 0; d < size; ++d) to[d] = from[d] / state.total[r];
    if (job.layer.value.format == KV_INT4) {
      if (first > 0) mix(to, first);
      mix(to + first, size - first);
    }
  }
}

void copy_queries(const Job& job, const Item& item, float* to) {
  const int64_t rows = item.queries() * job.group, size = job.layer.head_size;
  const float scale = static_cast<float>(job.op.scale);
  for (int64_t head = item.head_begin; head < item.head_end; ++head) {
    for (int64_t r = 0; r < rows; ++r, to += job.padded) {
      const int64_t t = item.query_begin + r / job.group;
      const float* from = job.q + (t * job.heads + head * job.group + r % job.group) * size;
      for (int64_t d = 0; d < size; ++d) to[d] = from[d] * scale;
      std::fill(to + size, to + job.padded, 0.0f);
    }
  }
}

void run_item(const Job& job, const Item& item, Scratch& scratch) {
  const int64_t rows = item.queries() * job.group, padded = job.padded;
  const int64_t heads = item.head_end - item.head_begin, state = job.state_floats(rows);
  const int32_t* table = job.batch.block_table + item.sequence * job.batch.table_stride;
  const Work work = {vectors_of(job.layer, job.layer.key, table),
                     vectors_of(job.layer, job.layer.value, table),
                     rows,
                     state,
                     scratch.floats(2, heads * rows * padded),
                     scratch.floats(4, heads * 2 * state),
                     scratch.floats(3, rows * kTile),
                     scratch.floats(5, kTile * padded),
                     scratch.floats(6, rows),
                     scratch.floats(7, kTile)};
  copy_queries(job, item, work.q);
  for (int64_t h = 0; h < heads; ++h) meet_none(job, item.head_begin + h, work.whole(h), rows);
  const int64_t last = job.batch.positions[item.query_end - 1];
  const int64_t first = job.first_seen(job.batch.positions[item.query_begin]);
  for (int64_t split = item.split_begin; split < item.split_end; ++split) {
    for (int64_t h = 0; h < heads; ++h) clear(work.split(h), rows, padded);
    const int64_t split_end = std::min((split + 1) * kSplit, last + 1);
    int64_t begin = std::max(split * kSplit, first), count;
    for (; begin < split_end; begin += count) {
      count = std::min((begin / kTile + 1) * kTile, split_end) - begin;
      for (int64_t head = item.head_begin; head < item.head_end; ++head) {
        const int64_t after = begin + count;
        const Tokens next = head + 1 < item.head_end
                                ? Tokens{head + 1, begin, count}
                                : Tokens{item.head_begin, after, std::min(kTile, last + 1 - after)};
        fold_tile(job, item, {head, begin, count}, next, work);
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      if (item.partial < 0) {
        merge(work.whole(h), work.split(h), rows, padded);
      } else {
        const float* from = work.states + 2 * h * state;
        std::copy(from, from + state, job.partials + (item.partial + h) * job.partial_floats);
      }
    }
  }
  if (item.partial >= 0) return;
  for (int64_t h = 0; h < heads; ++h) write_out(job, item, item.head_begin + h, work.whole(h));
}

// The items of one sequence, whole in their splits. Prompts: an item for every kv head and tile of
// queries. Few queries: `wide` items of all kv heads, which read whole pages in order.
void add_items(const Job& job, int64_t sequence, bool wide, std::vector<Item>& items) {
  const AttentionBatch& batch = job.batch;
  const int64_t tile = std::max<int64_t>(1, kRows / job.group);
  const int64_t begin = batch.query_starts[sequence], end = batch.query_starts[sequence + 1];
  const int64_t width = wide && (end - begin) * job.group <= kRows / 2 ? job.layer.kv_heads : 1;
  for (int64_t head = 0; head < job.layer.kv_heads; head += width) {
    for (int64_t t = begin; t < end; t += tile) {
      const int64_t stop = std::min(t + tile, end);
      const int64_t from = job.first_seen(batch.positions[t]) / kSplit;
      const int64_t split_end = batch.positions[stop - 1] / kSplit + 1;
      items.push_back({sequence, head, head + width, t, stop, from, split_end, -1});
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
  int64_t most_rows = 0, states = 0;
  for (const Item& item : whole) {
    starts.push_back(states);
    most_rows = std::max(most_rows, item.queries() * job.group);
    for (int64_t split = item.split_begin; split < item.split_end; ++split) {
      Item part = item;
      part.split_begin = split;
      part.split_end = split + 1;
      part.partial = states;
      states += item.head_end - item.head_begin;
      items.push_back(part);
    }
  }
  job.partial_floats = job.state_floats(most_rows);
  std::vector<float> partials(states * job.partial_floats);
  job.partials = partials.data();
  pool->run(static_cast<int64_t>(items.size()), 1,
            [&](int64_t i, Scratch& scratch) { run_item(job, items[i], scratch); });
  std::vector<float> floats(job.partial_floats);
  for (size_t w = 0; w < whole.size(); ++w) {
    const Item& item = whole[w];
    const int64_t rows = item.queries() * job.group, heads = item.head_end - item.head_begin;
    const State merged = state_at(floats.data(), rows);
    for (int64_t h = 0; h < heads; ++h) {
      meet_none(job, item.head_begin + h, merged, rows);
      for (int64_t i = 0; i < item.split_end - item.split_begin; ++i) {
        float* part = partials.data() + (starts[w] + i * heads + h) * job.partial_floats;
        merge(merged, state_at(part, rows), rows, job.padded);
      }
      write_out(job, item, item.head_begin + h, merged);
    }
  }
}

}  // namespace

// q and out are [tokens][heads][head_size].
OCTAVO_API int64_t octavo_attention(Pool* pool, const float* q, int64_t heads, const KVLayer* layer,
                                    const AttentionBatch* batch, const AttentionOp* op,
                                    float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const int64_t padded = (layer->head_size + 7) / 8 * 8;
  const bool is_wide = pool->isa() != AVX2;
  const Job job = {q,      out,     *layer, *batch, *op, heads, heads / layer->kv_heads,
                   padded, is_wide, nullptr, 0};
  if (!is_valid(job)) return BAD_INDEX;
  std::vector<Item> items;
  int64_t splits = 0;
  for (int64_t s = 0; s < batch->sequences; ++s) splits += batch->seq_lens[s] / kSplit + 1;
  const bool wide = splits >= 4 * pool->threads();
  for (int64_t s = 0; s < batch->sequences; ++s) add_items(job, s, wide, items);
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
