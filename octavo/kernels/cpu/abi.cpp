// What may run before it is known that the CPU can run the rest: compiled for the base ISA.
#include "native.h"
#include "pool.h"

OCTAVO_API int64_t octavo_is_supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return 0;
#endif
}

// What `fingerprint.py` makes of the sources that this was built from.
OCTAVO_API const char* octavo_sources() { return OCTAVO_SOURCES; }

OCTAVO_API const char* octavo_isa() { return "avx2 fma f16c"; }

OCTAVO_API octavo::Pool* octavo_create(int64_t threads) {
  return new octavo::Pool(static_cast<int>(threads));
}

OCTAVO_API void octavo_destroy(octavo::Pool* pool) { delete pool; }
