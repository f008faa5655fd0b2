// Ops on single tokens: norms, rotary embedding with the write to the cache.
#include "pool.h"

#include <algorithm>
#include <cmath>
#include <mutex>

#include "kv_formats.h"
#include "native.h"

namespace octavo {

namespace {

constexpr int64_t kTokenGrain = 16;

// scale = 1 / sqrt(mean(x^2) + eps); out may be x.
void norm_row(const float* x, const float* weight, int64_t size, double eps, float* out) {
  Lanes squares[4] = {zeros(), zeros(), zeros(), zeros()};
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const Lanes v = load(x + i);
    Lanes& to = squares[i / 8 % 4];
    to = fma(v, v, to);
  }
  const int64_t left = size - i;
  if (left > 0) {
    const Lanes v = load_some(x + i, left);
    squares[0] = fma(v, v, squares[0]);
  }
  const Lanes total = _mm256_add_ps(_mm256_add_ps(squares[0], squares[1]),
                                    _mm256_add_ps(squares[2], squares[3]));
  const float mean = sum(total) / static_cast<float>(size);
  const Lanes scale = broadcast(1.0f / std::sqrt(mean + static_cast<float>(eps)));
  for (i = 0; i + 8 <= size; i += 8) {
    store(out + i, _mm256_mul_ps(_mm256_mul_ps(load(x + i), scale), load(weight + i)));
  }
  if (left > 0) {
    const Lanes v = _mm256_mul_ps(load_some(x + i, left), scale);
    store_some(out + i, left, _mm256_mul_ps(v, load_some(weight + i, left)));
  }
}

void rotate_row(const float* x, const float* cos, const float* sin, int64_t rotary_dim,
                int64_t size, float* out) {
  const int64_t half = rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = x[i], high = x[i + half];
    out[i] = low * cos[i] - high * sin[i];
    out[i + half] = high * cos[i] + low * sin[i];
  }
  for (int64_t i = rotary_dim; i < size; ++i) out[i] = x[i];
}

void store_plain(int64_t format, const float* x, int64_t size, uint8_t* to) {
  if (format == KV_F32) {
    std::memcpy(to, x, 4 * size);
    return;
  }
  for (int64_t i = 0; i < size; i += 8) {
    const int64_t count = std::min<int64_t>(8, size - i);
    const Lanes v = count == 8 ? load(x + i) : load_some(x + i, count);
    const __m128i narrow = format == KV_F16 ? _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)
                                         : to_bf16(v);
    std::memcpy(to + 2 * i, &narrow, 2 * count);
  }
}

// Writes one head's vector to a slot, in the plane's format; x is given away.
void write(const KVLayer& layer, const KVPlane& plane, int64_t slot, int64_t head,
           const float* scales, float* x, bool is_mixed) {
  const int64_t size = layer.head_size, block = slot / layer.block_size;
  const int64_t vector = slot % layer.block_size * layer.kv_heads + head;
  uint8_t* numbers = plane.data + block * plane.stride + vector * number_bytes(plane.format, size);
  if (!is_quantized(plane.format)) return store_plain(plane.format, x, size, numbers);
  uint8_t* to = plane.scales + block * plane.scale_stride + vector * 2 * plane.num_scales;
  if (is_mixed) mix(x, size);
  write_vector(plane.format, x, size, scales == nullptr ? nullptr : scales + head, numbers, to);
}

}  // namespace

OCTAVO_API int64_t octavo_rms_norm(Pool* pool, const float* x, int64_t tokens, int64_t size,
                                   const float* weight, double eps, float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  pool->run(tokens, kTokenGrain, [&](int64_t t, Scratch&) {
    norm_row(x + t * size, weight, size, eps, out + t * size);
  });
  return OK;
}

OCTAVO_API int64_t octavo_add_rms_norm(Pool* pool, const float* x, float* residual, int64_t tokens,
                                       int64_t size, const float* weight, double eps, float* out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  pool->run(tokens, kTokenGrain, [&](int64_t t, Scratch&) {
    const float* from = x + t * size;
    float* row = residual + t * size;
    for (int64_t i = 0; i < size; ++i) row[i] += from[i];
    norm_row(row, weight, size, eps, out + t * size);
  });
  return OK;
}

// qkv rows are [heads + 2 * kv_heads][head_size]; q_out is [tokens][heads][head_size]. Without
// `rope` nothing is rotated. Queries are multiplied by what keys are divided by, and mixed if keys
// are.
OCTAVO_API int64_t octavo_rope_and_cache(Pool* pool, const float* qkv, int64_t heads,
                                         const Rope* rope, const QKNorm* norm, const KVLayer* layer,
                                         const Quantizing* quantizing, const AttentionBatch* batch,
                                         float* q_out) {
  std::lock_guard<std::mutex> lock(pool->op_mutex());
  const int64_t size = layer->head_size, kv_heads = layer->kv_heads;
  const int64_t width = (heads + 2 * kv_heads) * size, rotary_dim = rope ? rope->rotary_dim : 0;
  const int64_t slots = layer->blocks * layer->block_size;
  const KVPlane &key = layer->key, &value = layer->value;
  const bool is_changed = is_quantized(key.format);
  const float* shift = is_changed ? quantizing->key_shift : nullptr;
  const float* factor = is_changed ? quantizing->key_factor : nullptr;
  const bool mixes = mixes_keys(key.format, factor != nullptr);
  for (int64_t t = 0; t < batch->tokens; ++t) {
    const int64_t position = batch->positions[t], slot = batch->slot_mapping[t];
    if (position < 0 || slot < 0 || slot >= slots) return BAD_INDEX;
    if (rope != nullptr && position >= rope->positions) return BAD_INDEX;
  }
  pool->run(batch->tokens, kTokenGrain, [&](int64_t t, Scratch& scratch) {
    const float *q = qkv + t * width, *k = q + heads * size, *v = k + kv_heads * size;
    float* normed = scratch.floats(0, width);
    if (norm != nullptr) {
      const int64_t q_part = norm->per_head ? size : heads * size;
      const int64_t k_part = norm->per_head ? size : kv_heads * size;
      for (int64_t i = 0; i < heads * size; i += q_part) {
        norm_row(q + i, norm->query, q_part, norm->eps, normed + i);
      }
      for (int64_t i = 0; i < kv_heads * size; i += k_part) {
        norm_row(k + i, norm->key, k_part, norm->eps, normed + heads * size + i);
      }
      q = normed;
      k = normed + heads * size;
    }
    const int64_t at_position = batch->positions[t] * (rotary_dim / 2);
    const float* cos = rope ? rope->cos + at_position : nullptr;
    const float* sin = rope ? rope->sin + at_position : nullptr;
    for (int64_t h = 0; h < heads; ++h) {
      float* to = q_out + (t * heads + h) * size;
      rotate_row(q + h * size, cos, sin, rotary_dim, size, to);
      if (factor != nullptr) {
        const float* by = factor + h / (heads / kv_heads) * size;
        for (int64_t i = 0; i < size; ++i) to[i] *= by[i];
      }
      if (mixes) mix(to, size);
    }
    const int64_t slot = batch->slot_mapping[t];
    float* vector = scratch.floats(1, size);
    for (int64_t h = 0; h < kv_heads; ++h) {
      rotate_row(k + h * size, cos, sin, rotary_dim, size, vector);
      if (shift != nullptr) {
        for (int64_t i = 0; i < size; ++i) vector[i] -= shift[h * size + i];
      }
      if (factor != nullptr) {
        for (int64_t i = 0; i < size; ++i) vector[i] /= factor[h * size + i];
      }
      write(*layer, key, slot, h, quantizing->key_scales, vector, mixes);
      std::copy(v + h * size, v + (h + 1) * size, vector);
      write(*layer, value, slot, h, quantizing->value_scales, vector, value.format == KV_INT4);
    }
  });
  return OK;
}

}  // namespace octavo
