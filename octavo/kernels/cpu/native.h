// What the parts of the native kernels share: the matrix descriptor and the plain C ABI.
// Loaded by native.py through ctypes; no torch and no Python here.
#pragma once

#include <cstdint>

#define OCTAVO_API extern "C" __attribute__((visibility("default")))

namespace octavo {

// The order is that of WEIGHT_FORMATS in octavo/formats.py.
enum Format : int64_t {
  F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4,
  NVFP4, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M, TQ1_0, TQ2_0, INT4_32_F16,
  INT4_32_BF16, INT4_64_F16, INT4_64_BF16, INT4_128_F16, INT4_128_BF16, INT8_32, INT8_64, INT8_128,
  FP8
};
enum ActivationKind : int64_t { SILU, GELU_TANH, CLAMPED_SWIGLU };
enum Visibility : int64_t { FULL, WINDOW, CHUNK };
// Instruction sets, worst first: the order is that of ISAS in library.py.
enum Isa : int64_t { AVX2, AVX512, AVX512_BF16 };
enum Status : int64_t { OK, BAD_INDEX };

// [rows, cols] in `format`, rows `row_bytes` apart; data need not be aligned. `table`: what
// codes point to, or null for formats without one.
struct Matrix {
  const uint8_t* data;
  int64_t rows, cols, row_bytes, format;
  const float* table;
};

// alpha and limit are of CLAMPED_SWIGLU: see kernels/activations.py.
struct Activation {
  int64_t kind;
  double alpha, limit;
};

// The order is that of KV_CODES in structs.py; from KV_FP8 on vectors have scales.
enum KVFormat : int64_t { KV_F32, KV_F16, KV_BF16, KV_FP8, KV_INT8, KV_INT4 };

// Keys or values: [blocks, block_size, kv_heads, head_size] numbers, and bfloat16 scales [blocks,
// block_size, kv_heads, num_scales] or null; blocks a stride of bytes apart.
struct KVPlane {
  uint8_t *data, *scales;
  int64_t stride, scale_stride, num_scales, format;
};

// One layer's pages. first_part: numbers of a vector's first part where it has two, each with
// scales of its own; else 0.
struct KVLayer {
  KVPlane key, value;
  int64_t blocks, block_size, kv_heads, head_size, first_part;
};

// What quantising is told: scales of a checkpoint [kv_heads], or null; what is taken off keys first
// and what they are then divided by [kv_heads, head_size], or null.
struct Quantizing {
  const float *key_scales, *value_scales, *key_shift, *key_factor;
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
