// A recorded step: the calls of ops that it made, run again in one go, so that nothing of Python
// stands between two ops. `recording.py` writes the calls.
#include "pool.h"

#include "native.h"

namespace octavo {

struct MoeArgs;
struct Route;

// The order is that of OPS in recording.py.
enum Op : int64_t {
  EMBEDDING, RMS_NORM, ADD_RMS_NORM, LINEAR, GATED_MLP, MOE, ROUTE, ROPE_AND_CACHE, ATTENTION
};

// Arguments after the pool: integers, or addresses.
struct Call {
  int64_t op, args[8];
};

namespace {

template <class T>
T* at(int64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

extern "C" {
int64_t octavo_embedding(Pool*, const int32_t*, int64_t, const Matrix*, float*);
int64_t octavo_rms_norm(Pool*, const float*, int64_t, int64_t, const float*, double, float*);
int64_t octavo_add_rms_norm(Pool*, const float*, float*, int64_t, int64_t, const float*, double,
                            float*);
int64_t octavo_linear(Pool*, const float*, int64_t, const Matrix*, int64_t, const float*, float*);
int64_t octavo_gated_mlp(Pool*, const float*, int64_t, const Matrix*, const Activation*, float*,
                         float*);
int64_t octavo_moe(Pool*, const MoeArgs*);
int64_t octavo_route(Pool*, const Route*);
int64_t octavo_rope_and_cache(Pool*, const float*, int64_t, const Rope*, const QKNorm*,
                              const KVLayer*, const Quantizing*, const AttentionBatch*, float*);
int64_t octavo_attention(Pool*, const float*, int64_t, const KVLayer*, const AttentionBatch*,
                         const AttentionOp*, float*);
}

namespace {

int64_t run(Pool* pool, const Call& call) {
  const int64_t* a = call.args;
  switch (call.op) {
    case EMBEDDING:
      return octavo_embedding(pool, at<int32_t>(a[0]), a[1], at<Matrix>(a[2]), at<float>(a[3]));
    case RMS_NORM:
      return octavo_rms_norm(pool, at<float>(a[0]), a[1], a[2], at<float>(a[3]), *at<double>(a[4]),
                             at<float>(a[5]));
    case ADD_RMS_NORM:
      return octavo_add_rms_norm(pool, at<float>(a[0]), at<float>(a[1]), a[2], a[3],
                                 at<float>(a[4]), *at<double>(a[5]), at<float>(a[6]));
    case LINEAR:
      return octavo_linear(pool, at<float>(a[0]), a[1], at<Matrix>(a[2]), a[3], at<float>(a[4]),
                           at<float>(a[5]));
    case GATED_MLP:
      return octavo_gated_mlp(pool, at<float>(a[0]), a[1], at<Matrix>(a[2]), at<Activation>(a[3]),
                              at<float>(a[4]), at<float>(a[5]));
    case MOE: return octavo_moe(pool, at<MoeArgs>(a[0]));
    case ROUTE: return octavo_route(pool, at<Route>(a[0]));
    case ROPE_AND_CACHE:
      return octavo_rope_and_cache(pool, at<float>(a[0]), a[1], at<Rope>(a[2]), at<QKNorm>(a[3]),
                                   at<KVLayer>(a[4]), at<Quantizing>(a[5]),
                                   at<AttentionBatch>(a[6]), at<float>(a[7]));
    case ATTENTION:
      return octavo_attention(pool, at<float>(a[0]), a[1], at<KVLayer>(a[2]),
                              at<AttentionBatch>(a[3]), at<AttentionOp>(a[4]), at<float>(a[5]));
  }
  return BAD_INDEX;
}

}  // namespace

// Returns 0, or the number of the call that failed, from 1 on; those behind it were not run.
OCTAVO_API int64_t octavo_replay(Pool* pool, const Call* calls, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (run(pool, calls[i]) != OK) return i + 1;
  }
  return 0;
}

}  // namespace octavo
