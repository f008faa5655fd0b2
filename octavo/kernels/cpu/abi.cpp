// What may run before it is known that the CPU can run the rest: compiled for the base ISA.
#include "native.h"
#include "pool.h"

// Whether the CPU, and the system's handling of its registers, have all of an instruction set.
OCTAVO_API int64_t octavo_supports(int64_t isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case octavo::AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case octavo::AVX512:
      return octavo_supports(octavo::AVX2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vnni");
    case octavo::AVX512_BF16:
      return octavo_supports(octavo::AVX512) && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return 0;
}

// Whether products in bfloat16 are faster than those in float32: Intel's cores do half as many of
// them in a cycle, so that both take the same time at best.
OCTAVO_API int64_t octavo_prefers_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return octavo_supports(octavo::AVX512_BF16) && __builtin_cpu_is("amd");
#else
  return 0;
#endif
}

// What `fingerprint.py` makes of the sources that this was built from.
OCTAVO_API const char* octavo_sources() { return OCTAVO_SOURCES; }

OCTAVO_API octavo::Pool* octavo_create(int64_t threads, int64_t isa, int64_t rounds_to_int8) {
  return new octavo::Pool(static_cast<int>(threads), static_cast<octavo::Isa>(isa),
                          rounds_to_int8 != 0);
}

OCTAVO_API void octavo_destroy(octavo::Pool* pool) { delete pool; }
