// Where the vectors of a sequence lie in the pages, and how they become float32.
#pragma once

#include "kv_formats.h"
#include "native.h"

namespace octavo {

// Some tokens of one kv head.
struct Tokens {
  int64_t head, begin, count;
};
// Keys or values of one layer, or their scales, as one sequence sees them.
struct Pages {
  const uint8_t* base;
  int64_t block_stride, block_size, token_stride, vector_bytes;
  const int32_t* table;
};
// Calls use(i, vector) for the i-th of some tokens: a loop a page.
template <class Use>
void for_each_vector(const Pages& pages, const Tokens& tokens, const Use& use) {
  const int64_t head = tokens.head * pages.vector_bytes;
  int64_t column = tokens.begin / pages.block_size, offset = tokens.begin % pages.block_size;
  for (int64_t i = 0; i < tokens.count; ++column, offset = 0) {
    const uint8_t* at = pages.base + pages.table[column] * pages.block_stride + head +
                        offset * pages.token_stride;
    const int64_t stop = std::min(tokens.count, i + pages.block_size - offset);
    for (; i < stop; ++i, at += pages.token_stride) use(i, at);
  }
}

// Walks over consecutive tokens' vectors of one head (a division for every token would cost more
// than the token's scores).
class Walk {
 public:
  Walk(const Pages& pages, const Tokens& tokens)
      : pages_(pages), head_(tokens.head * pages.vector_bytes), left_(tokens.count) {
    column_ = tokens.begin / pages.block_size;
    const int64_t offset = tokens.begin % pages.block_size;
    if (left_ > 0) enter(offset);
  }
  bool has_next() const { return left_ > 0; }
  const uint8_t* next() {
    const uint8_t* found = at_;
    at_ += pages_.token_stride;
    --left_;
    if (--in_block_ == 0 && left_ > 0) {
      ++column_;
      enter(0);
    }
    return found;
  }

 private:
  void enter(int64_t offset) {
    at_ = pages_.base + pages_.table[column_] * pages_.block_stride + head_ +
          offset * pages_.token_stride;
    in_block_ = pages_.block_size - offset;
  }

  const Pages& pages_;
  const int64_t head_;
  int64_t left_, column_, in_block_ = 0;
  const uint8_t* at_ = nullptr;
};

// Asks the memory for coming tokens: pages are too scattered for the hardware to foresee, and all
// at once would be more than it takes.
class Coming {
 public:
  Coming(const Pages& pages, const Tokens& tokens) : walk_(pages, tokens) {
    lines_ = pages.vector_bytes;
  }
  void ask(int64_t vectors) {
    for (; vectors > 0 && walk_.has_next(); --vectors) {
      const char* from = reinterpret_cast<const char*>(walk_.next());
      for (int64_t line = 0; line < lines_; line += 64) _mm_prefetch(from + line, _MM_HINT_T0);
    }
  }

 private:
  Walk walk_;
  int64_t lines_;
};

// The vectors of a layer's keys or of its values.
struct Vectors {
  Pages numbers, scales;
  int64_t format, size, first_part;  // first_part: see KVLayer

  // Whether a vector has one scale, which its dot product can be multiplied by as well.
  bool has_one_scale() const { return is_quantized(format) && !is_expanded(); }
  // Whether vectors are only read as float32 copies.
  bool is_expanded() const { return format == KV_INT4 || (is_quantized(format) && first_part); }
};

inline Vectors vectors_of(const KVLayer& layer, const KVPlane& plane, const int32_t* table) {
  const int64_t bytes = number_bytes(plane.format, layer.head_size);
  const int64_t scales = 2 * plane.num_scales;
  return {{plane.data, plane.stride, layer.block_size, layer.kv_heads * bytes, bytes, table},
          {plane.scales, plane.scale_stride, layer.block_size, layer.kv_heads * scales, scales,
           table},
          plane.format,
          layer.head_size,
          layer.first_part};
}

// Replaces vectors by float32 copies of `padded` elements, without their scales.
template <class F>
void convert(const uint8_t** rows, int64_t count, int64_t size, int64_t padded, float* to) {
  for (int64_t i = 0; i < count; ++i, to += padded) {
    int64_t k = 0;
    for (; k + 8 <= size; k += 8) store(to + k, F::eight(rows[i], k));
    if (k < size) store(to + k, F::some(rows[i], k, size - k));
    rows[i] = reinterpret_cast<const uint8_t*>(to);
  }
}

template <class F>
void expand_parts(const Vectors& from, const uint8_t* numbers, const uint8_t* scales, float* to) {
  const int64_t first = from.first_part;
  expand_scaled<F>(numbers, scale_at(scales, 0), first, to);
  expand_scaled<F>(numbers + first, scale_at(scales, 1), from.size - first, to + first);
}

// Replaces vectors by float32 copies of `padded` elements, times their scales.
inline void expand(const Vectors& from, const Tokens& now, const uint8_t** rows, int64_t padded,
                   float* to) {
  Walk scales(from.scales, now);
  for (int64_t i = 0; i < now.count; ++i, to += padded) {
    std::fill(to + from.size, to + padded, 0.0f);
    const uint8_t* scale = scales.next();
    switch (from.format) {
      case KV_INT4: expand_int4(rows[i], scale, from.size, to); break;
      case KV_INT8: expand_parts<FormatInt8>(from, rows[i], scale, to); break;
      default: expand_parts<FormatFP8>(from, rows[i], scale, to); break;
    }
    rows[i] = reinterpret_cast<const uint8_t*>(to);
  }
}

// Calls use(F{}) with the type of a format whose numbers are read one by one.
template <class Use>
void with_kv_format(int64_t format, const Use& use) {
  switch (format) {
    case KV_F16: return use(FormatF16{});
    case KV_BF16: return use(FormatBF16{});
    case KV_FP8: return use(FormatFP8{});
    case KV_INT8: return use(FormatInt8{});
    default: return use(FormatF32{});
  }
}

}  // namespace octavo
