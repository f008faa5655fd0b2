// Weight formats as integer products take them: of kLanes rows the codes of a group of 32 elements,
// four of a row in a word, and what a code means: (code - bias) * scale + offset. The values are
// those of formats.h. Included behind int8_words.h and what an instruction set does itself.
#pragma once

#include "native.h"

namespace octavo {
inline namespace OCTAVO_ISA {

// Words [8][kLanes]: word j has elements 4j..4j+3. One scale, or one for every 16 elements.
struct Group {
  Words codes[8];
  Floats scale[2], offset;
};

// Codes of `bits` bits; those of eight are signed, and `ready` as the products want them.
template <int bits, int bias, int halves = 1, bool offset = false>
struct Codes {
  static constexpr int kBits = bits, kBias = bias, kHalves = halves;
  static constexpr bool kOffset = offset;
  using Shape = Codes;
};
using SignedCodes = Codes<8, 0>;

struct NoState {};

// 16 bytes of each row, whose low nibbles are elements 0..15 and whose high ones the others.
OCTAVO_INLINE void nibbles(const uint8_t* at, int64_t stride, Words codes[8]) {
  Words w[4];
  words4(at, stride, w);
  for (int j = 0; j < 4; ++j) {
    codes[j] = w[j] & words(0x0f0f0f0f);
    codes[4 + j] = right(w[j], 4) & words(0x0f0f0f0f);
  }
}
OCTAVO_INLINE void words8(const uint8_t* at, int64_t stride, Words w[8]) {
  words4(at, stride, w);
  words4(at + 16, stride, w + 4);
}
// The fifth bit of each element, bit i of a row's 32 for element i.
OCTAVO_INLINE void add_fifth_bits(Words bits, Words codes[8]) {
  for (int j = 0; j < 8; ++j) codes[j] = codes[j] | spread_bits(right(bits, 4 * j));
}
OCTAVO_INLINE Words byte_of(Words w, int64_t index) {
  return right(w, 8 * static_cast<int>(index)) & words(255);
}

struct Int8Q8_0 : SignedCodes {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State&, Group& to) {
    at += 34 * g;
    to.scale[0] = halves(word(at, stride));
    words8(at + 2, stride, to.codes);
    for (Words& w : to.codes) w = ready(w);
  }
};
struct Int8Q4_0 : Codes<4, 8> {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State&, Group& to) {
    at += 18 * g;
    to.scale[0] = halves(word(at, stride));
    nibbles(at + 2, stride, to.codes);
  }
};
struct Int8Q4_1 : Codes<4, 0, 1, true> {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State&, Group& to) {
    at += 20 * g;
    const Words both = word(at, stride);
    to.scale[0] = halves(both);
    to.offset = halves(right(both, 16));
    nibbles(at + 4, stride, to.codes);
  }
};
struct Int8Q5_0 : Codes<5, 16> {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State&, Group& to) {
    at += 22 * g;
    to.scale[0] = halves(word(at, stride));
    nibbles(at + 6, stride, to.codes);
    add_fifth_bits(word(at + 2, stride), to.codes);
  }
};
struct Int8Q5_1 : Codes<5, 0, 1, true> {
  using State = NoState;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State&, Group& to) {
    at += 24 * g;
    const Words both = word(at, stride);
    to.scale[0] = halves(both);
    to.offset = halves(right(both, 16));
    nibbles(at + 8, stride, to.codes);
    add_fifth_bits(word(at + 4, stride), to.codes);
  }
};

// Two groups' nibbles in 32 bytes, and 6-bit scales and minimums of the eight groups of a block.
struct KState {
  Words both[8], scales[2], minimums[2];
  Floats d, minimum;
};
OCTAVO_INLINE void enter_k(const uint8_t* block, int64_t stride, KState& of) {
  Words head[4];
  words4(block, stride, head);
  of.d = halves(head[0]);
  of.minimum = halves(right(head[0], 16));
  const Words low = words(0x0f0f0f0f), high = words(0x30303030), six = words(0x3f3f3f3f);
  of.scales[0] = head[1] & six;
  of.minimums[0] = head[2] & six;
  of.scales[1] = (head[3] & low) | (right(head[1], 2) & high);
  of.minimums[1] = (right(head[3], 4) & low) | (right(head[2], 2) & high);
}
OCTAVO_INLINE void k_group(const uint8_t* codes, int64_t stride, int64_t sub, KState& of,
                           Group& to) {
  if (sub % 2 == 0) words8(codes + 32 * (sub / 2), stride, of.both);
  to.scale[0] = floats(byte_of(of.scales[sub / 4], sub % 4)) * of.d;
  to.offset = -(floats(byte_of(of.minimums[sub / 4], sub % 4)) * of.minimum);
  for (int j = 0; j < 8; ++j) {
    to.codes[j] = right(of.both[j], static_cast<int>(4 * (sub % 2))) & words(0x0f0f0f0f);
  }
}
struct Int8Q4_K : Codes<4, 0, 1, true> {
  using State = KState;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State& of,
                                  Group& to) {
    at += 144 * (g / 8);
    if (g % 8 == 0) enter_k(at, stride, of);
    k_group(at + 16, stride, g % 8, of, to);
  }
};
struct Int8Q5_K : Codes<5, 0, 1, true> {
  struct State : KState {
    Words fifth[8];
  };
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State& of,
                                  Group& to) {
    at += 176 * (g / 8);
    if (g % 8 == 0) {
      enter_k(at, stride, of);
      words8(at + 16, stride, of.fifth);
    }
    k_group(at + 48, stride, g % 8, of, to);
    for (int j = 0; j < 8; ++j) {
      const Words bit = right(of.fifth[j], static_cast<int>(g % 8)) & words(0x01010101);
      to.codes[j] = to.codes[j] | left(bit, 4);
    }
  }
};
struct Int8Q6_K : Codes<6, 32, 2> {
  struct State {
    Words low[16], high[8], scales[4];
    Floats d;
  };
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State& of,
                                  Group& to) {
    at += 210 * (g / 8);
    const int64_t half = g % 8 / 4, sub = g % 4;
    if (g % 8 == 0) {
      words4(at + 192, stride, of.scales);
      of.d = halves(right(word(at + 206, stride), 16));
    }
    if (sub == 0) {
      words8(at + 64 * half, stride, of.low);
      words8(at + 64 * half + 32, stride, of.low + 8);
      words8(at + 128 + 32 * half, stride, of.high);
    }
    for (int i = 0; i < 2; ++i) {
      const Words scales = of.scales[g % 8 / 2];
      const int shift = static_cast<int>(24 - 8 * (2 * (g % 2) + i));
      to.scale[i] = floats(signed_right(left(scales, shift), 24)) * of.d;
    }
    for (int j = 0; j < 8; ++j) {
      const Words low = right(of.low[8 * (sub % 2) + j], static_cast<int>(4 * (sub / 2)));
      const Words high = right(of.high[j], static_cast<int>(2 * sub)) & words(0x03030303);
      to.codes[j] = (low & words(0x0f0f0f0f)) | left(high, 4);
    }
  }
};

struct Scales {
  Floats scale, offset;
};
struct HalfScale {
  static OCTAVO_INLINE Floats of(Words w) { return halves(w); }
};
struct BFloatScale {
  static OCTAVO_INLINE Floats of(Words w) { return same_bits(left(w, 16)); }
};
template <class Scale, int kGroup>
struct Int8Int4 : Codes<4, 0, 1, true> {
  using State = Scales;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State& of,
                                  Group& to) {
    constexpr int64_t kGroups = kGroup / 32;
    at += (3 + kGroup / 2) * (g / kGroups);
    if (g % kGroups == 0) {
      const Words head = word(at, stride);  // scale, zero, and a byte of codes
      of.scale = Scale::of(head);
      of.offset = -(floats(byte_of(head, 2)) * of.scale);
    }
    to.scale[0] = of.scale;
    to.offset = of.offset;
    nibbles(at + 3 + 16 * (g % kGroups), stride, to.codes);
  }
};
template <int kGroup>
struct Int8Int8 : Codes<8, 0, 1, true> {
  using State = Scales;
  static OCTAVO_INLINE void group(const uint8_t* at, int64_t stride, int64_t g, State& of,
                                  Group& to) {
    constexpr int64_t kGroups = kGroup / 32;
    at += (5 + kGroup) * (g / kGroups);
    if (g % kGroups == 0) {
      of.scale = same_bits(word(at, stride));
      const Floats zero = floats(byte_of(word(at + 4, stride), 0));
      of.offset = (floats(words(128)) - zero) * of.scale;
    }
    to.scale[0] = of.scale;
    to.offset = of.offset;
    words8(at + 5 + 32 * (g % kGroups), stride, to.codes);
    for (Words& w : to.codes) w = ready(w ^ words(0x80808080));
  }
};

// Calls use(F{}) with the type of `format`, which `has_int8_product` knows.
template <class Use>
inline void with_int8_format(int64_t format, const Use& use) {
  switch (format) {
    case Q8_0: return use(Int8Q8_0{});
    case Q4_0: return use(Int8Q4_0{});
    case Q4_1: return use(Int8Q4_1{});
    case Q5_0: return use(Int8Q5_0{});
    case Q5_1: return use(Int8Q5_1{});
    case Q4_K: return use(Int8Q4_K{});
    case Q5_K: return use(Int8Q5_K{});
    case Q6_K: return use(Int8Q6_K{});
    case INT4_32_F16: return use(Int8Int4<HalfScale, 32>{});
    case INT4_32_BF16: return use(Int8Int4<BFloatScale, 32>{});
    case INT4_64_F16: return use(Int8Int4<HalfScale, 64>{});
    case INT4_64_BF16: return use(Int8Int4<BFloatScale, 64>{});
    case INT4_128_F16: return use(Int8Int4<HalfScale, 128>{});
    case INT4_128_BF16: return use(Int8Int4<BFloatScale, 128>{});
    case INT8_32: return use(Int8Int8<32>{});
    case INT8_64: return use(Int8Int8<64>{});
    case INT8_128: return use(Int8Int8<128>{});
  }
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
