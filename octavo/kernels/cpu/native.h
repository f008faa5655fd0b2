// What the parts of the native kernels share: the matrix descriptor and the plain C ABI.
// Loaded by native.py through ctypes; no torch and no Python here.
#pragma once

#include <cstdint>

#define OCTAVO_API extern "C" __attribute__((visibility("default")))

namespace octavo {

// The order is that of FORMAT_CODES in native.py.
enum Format : int64_t { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K };
enum ActivationKind : int64_t { SILU, GELU_TANH, CLAMPED_SWIGLU };
enum Visibility : int64_t { FULL, WINDOW, CHUNK };
enum Status : int64_t { OK, BAD_INDEX };

// [rows, cols] in `format`, rows `row_bytes` apart; data need not be aligned.
struct Matrix {
  const uint8_t* data;
  int64_t rows, cols, row_bytes, format;
};

// alpha and limit are of CLAMPED_SWIGLU: see kernels/activations.py.
struct Activation {
  int64_t kind;
  double alpha, limit;
};

// One layer's pages: [blocks, block_size, kv_heads, head_size], blocks a stride of bytes apart.
struct KVLayer {
  uint8_t *key, *value;
  int64_t key_stride, value_stride, blocks, block_size, kv_heads, head_size, format;
};

struct AttentionBatch {
  const int32_t *positions, *query_starts, *seq_lens, *block_table;
  const int64_t* slot_mapping;
  int64_t tokens, sequences, table_stride, table_columns;
};

struct Rope {
  const float *cos, *sin;
  int64_t positions, rotary_dim;
};

struct QKNorm {
  const float *query, *key;
  double eps;
  int64_t per_head;
};

// What a layer asks of attention. FULL: a query sees all tokens up to itself; WINDOW: the last
// `visible_size` of them; CHUNK: those with its own position / visible_size.
struct AttentionOp {
  double scale, soft_cap;  // soft_cap 0: none
  const float* sinks;      // [heads], or null
  int64_t visibility, visible_size;
};

class Pool;

}  // namespace octavo
