"""What instructions do to words of compressed keys and values, without them: for gluon_cpu.py.

Instructions are told apart by what only they name. Words are int32 of any shape; pairs of numbers
come as two tensors of 16 bits.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from tests.kernels.triton.gluon_values import Value

Made = Value | tuple[Value, ...]


def of_words(text: str, values: list[Value]) -> Made:
    """Returns what the instructions make of values."""
    make = next(make for sign, make in _MADE.items() if sign in text)
    return make(text, values)


def _unsigned(x: Value) -> Tensor:
    return x.data.long() & 0xFFFFFFFF


def _words(x: Tensor) -> Value:
    """Returns unsigned numbers of 32 bits as int32."""
    return Value(torch.where(x >= 1 << 31, x - (1 << 32), x).int())


def _shorts(x: Tensor) -> Tensor:
    x = x & 0xFFFF
    return torch.where(x >= 1 << 15, x - (1 << 16), x).short()


def _pairs(*words: Tensor) -> tuple[Value, ...]:
    return tuple(Value(_shorts(x >> shift)) for x in words for shift in (0, 16))


def _halves(text: str, values: list[Value]) -> Made:
    word = _unsigned(values[0])
    return _pairs(*(x & mask for mask in (0x000F000F, 0x00F000F0) for x in (word, word >> 8)))


def _bytes(text: str, values: list[Value]) -> Made:
    word = _unsigned(values[0])
    return _pairs(*((x & 0x00FF00FF) ^ 0x00800080 for x in (word, word >> 8)))


def _e4m3(text: str, values: list[Value]) -> Made:
    """2^-120 of each number."""
    word = _unsigned(values[0])
    both = ((x & 0xFFFFFFFF) for x in (word << 8, word))
    return _pairs(*(((x >> 4) & 0x07F007F0) | (x & 0x80008000) for x in both))


def _floats(text: str, values: list[Value]) -> Made:
    """Numbers of e4m3 as float16, in the order that they lie in."""
    numbers = values[0].data.contiguous().view(torch.float8_e4m3fn)
    numbers = numbers.reshape(*values[0].data.shape, 4).half().view(torch.int16)
    return tuple(Value(numbers[..., i]) for i in range(4))


def _transposed(text: str, values: list[Value]) -> Made:
    """8 x 8 at a time, of pairs of heads of tokens: pairs of tokens of heads, in their places."""
    both = torch.stack([x.data.bfloat16() for x in values], -1)
    warps, tokens, pairs, _ = both.shape
    blocks = both.reshape(warps, tokens // 8, 8, pairs // 4, 8).permute(0, 1, 4, 3, 2)
    shorts = blocks.contiguous().view(torch.int16).long() & 0xFFFF
    found = shorts[..., ::2] | shorts[..., 1::2] << 16
    return Value(_words(found).data.reshape(warps, tokens, pairs))


def _times(text: str, values: list[Value]) -> Made:
    first, second = (
        [x.data.view(torch.bfloat16).float() for x in _pairs(_unsigned(one))] for one in values
    )
    return tuple(Value((a * b).bfloat16()) for a, b in zip(first, second, strict=True))


def _apart(text: str, values: list[Value]) -> Made:
    return tuple(Value(x.data.view(torch.bfloat16)) for x in _pairs(_unsigned(values[0])))


def _chosen(text: str, values: list[Value]) -> Made:
    """Bytes of two words, by numbers of 4 bits in the instruction or in a third one."""
    either = torch.stack([_unsigned(x) for x in values[:2]])
    places: list[int | Tensor] = [int(one, 16) for one in re.findall("0x([0-9a-f]{4})", text)]
    found = []
    for place in places or [_unsigned(values[2])]:
        word = torch.zeros_like(either[0])
        for i in range(4):
            byte = torch.as_tensor((place >> 4 * i) & 7).expand(word.shape)
            source = either.gather(0, (byte // 4)[None])[0]
            word |= (source >> 8 * (byte % 4) & 0xFF) << 8 * i
        found.append(_words(word))
    return found[0] if len(found) == 1 else tuple(found)


_MADE: dict[str, Callable[[str, list[Value]], Made]] = {
    "0x000f000f": _halves,
    "0x00ff00ff": _bytes,
    "0x07f007f0": _e4m3,
    "cvt.rn.f16x2.e4m3x2": _floats,
    "movmatrix": _transposed,
    "mul.rn.bf16x2": _times,
    "mov.b32 {$0, $1}, $2;": _apart,
    "prmt.b32": _chosen,
    "ex2.approx": lambda text, values: Value(values[0].data.exp2()),
}
