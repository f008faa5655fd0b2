// Registers of kLanes words, one of each row of weights, in the compiler's own vectors: the same for
// every instruction set. A file says how many lanes it has (OCTAVO_LANES), and does itself what one
// set alone can do.
#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"
#include "simd.h"

namespace octavo {
inline namespace OCTAVO_ISA {

constexpr int kLanes = OCTAVO_LANES;

using Signed = int32_t __attribute__((vector_size(4 * kLanes)));
using Unsigned = uint32_t __attribute__((vector_size(4 * kLanes)));
template <int lanes>
struct Registers;
template <>
struct Registers<8> {
  using Words = __m256i;
  using Floats = __m256;
};
template <>
struct Registers<16> {
  using Words = __m512i;
  using Floats = __m512;
};
using Words = Registers<kLanes>::Words;
using Floats = Registers<kLanes>::Floats;

OCTAVO_INLINE Words words(int v) { return reinterpret_cast<Words>(Signed{} + v); }
OCTAVO_INLINE Words left(Words v, int n) {
  return reinterpret_cast<Words>(reinterpret_cast<Unsigned>(v) << n);
}
OCTAVO_INLINE Words right(Words v, int n) {
  return reinterpret_cast<Words>(reinterpret_cast<Unsigned>(v) >> n);
}
OCTAVO_INLINE Words signed_right(Words v, int n) {
  return reinterpret_cast<Words>(reinterpret_cast<Signed>(v) >> n);
}
OCTAVO_INLINE Floats same_bits(Words v) { return reinterpret_cast<Floats>(v); }
OCTAVO_INLINE Floats floats(Words v) {
  return __builtin_convertvector(reinterpret_cast<Signed>(v), Floats);
}
OCTAVO_INLINE Floats all(float v) { return v - Floats{}; }
OCTAVO_INLINE void put(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

// Where the word at `at` of each row is, in bytes.
OCTAVO_INLINE Words row_offsets(int64_t stride) {
  Signed row;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) row[i] = i;
  return reinterpret_cast<Words>(row * static_cast<int>(stride));
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
