"""Tiles of compressed keys and values, from global memory into registers: words of numbers.

Called by lone.py; packed_scales.py has their scales. Every warp has tiles of its own: TOKENS
tokens. A thread loads what it multiplies (packed_products.py), or else what threads of its warp
exchange: the more of a vector comes at once the better; nothing passes through shared memory. All
loads are masked: those that are not the compiler delays to where their results are used. Tensors
are [W, ...], W the warps.
docs/kv_formats.md has the layout in memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TOKENS = gl.constexpr(16)
"""Tokens of a warp's tile: all of one page."""


@gluon.constexpr_function
def num_loads(format: str, size: int) -> int:
    """Returns in how many pieces of 64 bytes, or all there are, a vector is loaded."""
    return max(1, size // 128) if format == "int4" else 1


@gluon.constexpr_function
def warp_bases(warps: int) -> list[list[int]]:
    return [[1 << i, 0, 0] for i in range(warps.bit_length() - 1)]


@gluon.constexpr_function
def _word_layout(
    warps: int, words: int, is_key: bool, low: list[int], lanes: list[int]
) -> gl.DistributedLinearLayout:
    """Of words [W, 8 or 4, words]: each thread those of a token whose index has bits of `low`; bits
    of `lanes` tell the threads of a token apart."""
    places = [[0, 0, bit] for bit in lanes]
    tokens = [[0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, bit] for bit in low],
        places + tokens if is_key else tokens[:2] + places,
        warp_bases(warps),
        [],
        [warps, 8 if is_key else 4, words],
    )


@gluon.constexpr_function
def loaded_layout(warps: int, format: str, words: int, is_key: bool) -> gl.DistributedLinearLayout:
    """As words come from memory: what a token has in one piece of 32 bytes or more."""
    if words == 16 and format == "int4":
        low, lanes = ([1, 2], [8, 4]) if is_key else ([1], [8, 2, 4])
    elif is_key:
        size = min(4, words // 4)
        low = [1 << i for i in range(size.bit_length() - 1)]
        low += [4 * size << i for i in range((words // (4 * size)).bit_length() - 1)]
        lanes = [size, 2 * size]
    else:
        size = words // 8
        low = [1 << i for i in range(size.bit_length() - 1)]
        lanes = [size, 2 * size, 4 * size]
    return _word_layout(warps, words, is_key, low, lanes)


@gluon.constexpr_function
def block_layout(warps: int, is_key: bool) -> gl.DistributedLinearLayout:
    """Of 16 words of int4, two blocks: each thread as much of both."""
    low, lanes = ([1, 8], [2, 4]) if is_key else ([8], [1, 2, 4])
    return _word_layout(warps, 16, is_key, low, lanes)


@gluon.jit
def _two_blocks(x, IS_KEY: gl.constexpr):
    """Returns 16 words of a token [W, .., 16] as two of 8."""
    W: gl.constexpr = x.shape[0]
    x = gl.convert_layout(x, block_layout(W, IS_KEY))
    return gl.split(x.reshape([W, x.shape[1], 2, 8]).permute((0, 1, 3, 2)))


@gluon.jit
def blocks_of(words, IS_KEY: gl.constexpr):
    """Returns the words of each block of 64 numbers of int4."""
    blocks = ()
    for i in gl.static_range(len(words)):
        if words[i].shape[2] == 16:
            blocks = blocks + _two_blocks(words[i], IS_KEY)
        else:
            blocks = blocks + (words[i],)
    return blocks


@gluon.constexpr_function
def places_of(is_key: bool) -> tuple[int, ...]:
    """Returns which tokens a thread has, from its first on."""
    return (0, 8) if is_key else (0, 1, 8, 9)


@gluon.jit
def load_words(
    plane, page, inside, live, STRIDE: gl.constexpr, D: gl.constexpr, FORMAT: gl.constexpr,
    IS_KEY: gl.constexpr,
):  # fmt: skip
    """Returns the words of vectors of TOKENS tokens of pages `page` [W] from `inside` [W] on, of
    which `live` [W] are visible: for each of `places_of` as many as a vector is loaded in. STRIDE:
    vectors of a token."""
    LOADS: gl.constexpr = num_loads(FORMAT, D)
    BYTES: gl.constexpr = D // 2 if FORMAT == "int4" else D
    WORDS: gl.constexpr = BYTES // LOADS // 4
    layout: gl.constexpr = loaded_layout(page.shape[0], FORMAT, WORDS, IS_KEY)
    rows: gl.constexpr = gl.SliceLayout(2, layout)
    one: gl.constexpr = gl.SliceLayout(1, rows)
    numbers, _, stride, _, _ = plane
    token = gl.arange(0, layout.shape[1], gl.SliceLayout(0, rows))[None, :] * (1 if IS_KEY else 2)
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    first = gl.convert_layout(page, one).to(gl.int64)[:, None] * stride
    first = first + gl.convert_layout(inside * (STRIDE * BYTES), one)[:, None]
    there = (numbers + first).to(gl.pointer_type(gl.int32))[:, :, None]
    there = there + ((token * (STRIDE * BYTES // 4))[:, :, None] + word)
    left = gl.convert_layout(live, one)[:, None] - token
    loaded = ()
    for place in gl.static_range(len(places_of(IS_KEY))):
        for i in gl.static_range(LOADS):
            # Added to all alike, so that one address serves all loads.
            at = there + (places_of(IS_KEY)[place] * (STRIDE * BYTES // 4) + i * WORDS)
            mask = (left > places_of(IS_KEY)[place])[:, :, None]
            loaded = loaded + (gl.load(at, mask=mask, other=0),)
    return loaded
