"""The instructions that make numbers of codes, written when a kernel is built.

Called by `codes.py`. Each text takes words of 16 bits in pairs, and makes a pair of floats for each
part of them.

A bfloat16 that begins with 0x43 is 128 and the number in its last 7 bits, a float16 with 0x64 1024
and that in its last 10.
"""

from __future__ import annotations

from octavo.planes import IQ4_VALUES, PlaneLayout

SMALL = {"e2m1": 126, "e4m3": 120}
"""By which powers of two numbers are too small whose bits have only been moved to where a bfloat16
has its own."""


def text_of(layout: PlaneLayout, is_bf16: bool, sub: int, *, is_small: bool = False) -> str:
    """Returns the instructions for words whose high bits are the part `sub` of theirs: operands are
    the parts' numbers, the words, and the high words where the layout has some. `is_small`: numbers
    stay too small (`SMALL`)."""
    if layout.values == "e4m3":
        body = _e4m3(is_bf16, is_small)
    elif layout.values == "e2m1":
        body = _e2m1(is_bf16, is_small)
    elif layout.values == "iq4":
        body = _iq4(is_bf16)
    elif layout.bits == 8 and is_bf16:
        body = _bytes()
    else:
        body = _uint(layout, is_bf16, sub)
    return "{\n.reg .b32 a, b, c, d, e, f, g, h;\n" + "\n".join(body) + "\n}"


def constraints_of(layout: PlaneLayout) -> str:
    """Returns the constraints of the operands of `text_of`."""
    return ",".join(["=r"] * layout.parts + ["r"] * (2 if layout.high else 1))


def _twice(half: int) -> str:
    return f"0x{half << 16 | half:08x}"


def _moved(target: str, source: str, right: int) -> str:
    kind = "shr" if right > 0 else "shl"
    return f"{kind}.b32 {target}, {source}, {abs(right)};"


def _uint(layout: PlaneLayout, is_bf16: bool, sub: int) -> list[str]:
    """Codes behind the magic beginning: their bits at the end, high ones above them."""
    magic, parts, bits = _twice(0x4300 if is_bf16 else 0x6400), layout.parts, layout.bits
    words, high, lines = f"${parts}", f"${parts + 1}", []
    mask, high_mask = _twice((1 << bits) - 1), _twice(((1 << layout.high) - 1) << bits)
    for part in range(parts):
        source = words
        if part:
            lines.append(_moved("a", words, bits * part))
            source = "a"
        made = "b" if layout.high else f"${part}"
        lines.append(f"lop3.b32 {made}, {source}, {mask}, {magic}, 0xea;")
        if layout.high:
            right = layout.high * (parts * sub + part) - bits
            source = high
            if right:
                lines.append(_moved("a", high, right))
                source = "a"
            lines.append(f"lop3.b32 ${part}, {source}, {high_mask}, b, 0xea;")
    return lines


def _bytes() -> list[str]:
    """Bytes: 128 and the last seven bits, less 128 where the first is not set."""
    lines = ["mov.b32 d, 0x43004300;"]
    for part, (source, signs) in enumerate((("$2", "0xaa88"), ("a", "0xbb99"))):
        if part:
            lines.append("shr.b32 a, $2, 8;")
        lines += [
            f"lop3.b32 b, {source}, 0x007f007f, 0x43004300, 0xea;",
            f"prmt.b32 c, $2, $2, {signs};",
            "lop3.b32 c, d, c, c, 0x30;",  # d and not c
            f"sub.rn.bf16x2 ${part}, b, c;",
        ]
    return lines


def _e2m1(is_bf16: bool, is_small: bool) -> list[str]:
    """Exponent and mantissa of a number that is by a power of two too small."""
    at, mask, factor, kind = (
        (6, "0x01c001c0", "0x7e807e80", "bf16x2")
        if is_bf16
        else (9, "0x0e000e00", "0x74007400", "f16x2")
    )
    lines = [f"mov.b32 g, {factor};"]
    for part in range(4):
        signs = "$4"
        if part < 3:
            lines.append(_moved("b", "$4", 4 * part - 12))
            signs = "b"
        lines += [
            _moved("a", "$4", 4 * part - at) if 4 * part != at else "mov.b32 a, $4;",
            f"and.b32 a, a, {mask};",
            f"lop3.b32 {f'${part}' if is_small else 'a'}, {signs}, 0x80008000, a, 0xea;",
        ]
        if not is_small:
            lines.append(f"mul.rn.{kind} ${part}, a, g;")
    return lines


def _e4m3(is_bf16: bool, is_small: bool) -> list[str]:
    at, mask, factor, kind = (
        (4, "0x07f007f0", "0x7b807b80", "bf16x2")
        if is_bf16
        else (1, "0x3f803f80", "0x5c005c00", "f16x2")
    )
    lines = [f"mov.b32 g, {factor};", "shl.b32 c, $2, 8;"]
    for part, source in enumerate(("c", "$2")):
        lines += [
            f"shr.b32 b, {source}, {at};",
            f"and.b32 b, b, {mask};",
            f"lop3.b32 {f'${part}' if is_small else 'b'}, {source}, 0x80008000, b, 0xea;",
        ]
        if not is_small:
            lines.append(f"mul.rn.{kind} ${part}, b, g;")
    return lines


def _iq4(is_bf16: bool) -> list[str]:
    """Both bytes of a table's floats, looked up in halves of it; the fourth bit of a code says
    which half counts. A lookup serves the four codes of a word."""
    halves = [_half_bits(value, is_bf16) for value in IQ4_VALUES]
    tables = [
        [
            sum(((halves[4 * four + one] >> shift) & 255) << (8 * one) for one in range(4))
            for four in range(4)
        ]
        for shift in (0, 8)
    ]
    lines = [
        ".reg .b32 t0, t1, t2, t3, u0, u1, u2, u3, m, x, y;",
        *(f"mov.b32 t{four}, 0x{tables[0][four]:08x};" for four in range(4)),
        *(f"mov.b32 u{four}, 0x{tables[1][four]:08x};" for four in range(4)),
        "and.b32 c, $4, 0x77777777;",
        "and.b32 d, $4, 0x88888888;",
        "shr.b32 d, d, 3;",
        "mov.b32 m, 0x0000ff00;",
    ]
    for first, second in (("e", "f"), ("g", "h")):  # the lower word of a pair, the upper
        lines += [
            "prmt.b32 b, m, m, d;",
            *_looked_up("x", "t"),
            *_looked_up("y", "u"),
            f"prmt.b32 {first}, x, y, 0x5140;",
            f"prmt.b32 {second}, x, y, 0x7362;",
            "shr.b32 c, c, 16;",
            "shr.b32 d, d, 16;",
        ]
    return [
        *lines,
        "prmt.b32 $0, e, g, 0x5410;",
        "prmt.b32 $1, e, g, 0x7632;",
        "prmt.b32 $2, f, h, 0x5410;",
        "prmt.b32 $3, f, h, 0x7632;",
    ]


def _looked_up(target: str, table: str) -> list[str]:
    return [
        f"prmt.b32 {target}, {table}0, {table}1, c;",
        f"prmt.b32 a, {table}2, {table}3, c;",
        f"lop3.b32 {target}, {target}, a, b, 0xd8;",  # a where b, else what was there
    ]


def _half_bits(value: int, is_bf16: bool) -> int:
    """Returns the bits of a small whole number as a bfloat16, or as a float16."""
    size = abs(value)
    exponent = size.bit_length() - 1
    mantissa_bits, bias = (7, 127) if is_bf16 else (10, 15)
    mantissa = (size << (mantissa_bits - exponent)) & ((1 << mantissa_bits) - 1)
    sign = 0x8000 if value < 0 else 0
    return sign | (exponent + bias) << mantissa_bits | mantissa
