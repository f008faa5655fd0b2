"""Scales of tiles of compressed keys and values, and as products take them.

Called by lone.py on the tiles of packed_tiles.py. Every thread has the scales of the tokens that it
has words of: places are those of its tokens. Tensors are [W, ...], W the warps.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from octavo.kernels.triton.attention.hopper.packed_tiles import TOKENS, places_of, warp_bases


@gluon.constexpr_function
def _bits(count: int, first: int) -> list[list[int]]:
    """Bases of `count` words, a power of two, the first of them `first`."""
    return [[0, 0, first << i] for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _scale_words(warps: int, words: int, is_key: bool) -> gl.DistributedLinearLayout:
    """Of words of scales [W, 8 or 4, words]: each thread those of a token."""
    none, tokens = [[0, 0, 0]], [[0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        _bits(words, 1),
        none * 2 + tokens if is_key else tokens[:2] + none * 3,
        warp_bases(warps),
        [],
        [warps, 8 if is_key else 4, words],
    )


@gluon.jit
def load_scales(
    plane, page, inside, live, STRIDE: gl.constexpr, COUNT: gl.constexpr, IS_KEY: gl.constexpr
):  # fmt: skip
    """Returns words [W, .., words] with the COUNT scales of each token, for each of `places_of`; 0
    if hidden; where it is one, another head's beside it. They are taken apart only where they are
    used: what does that at once waits for them."""
    WORDS: gl.constexpr = max(1, COUNT // 2)
    layout: gl.constexpr = _scale_words(page.shape[0], WORDS, IS_KEY)
    rows: gl.constexpr = gl.SliceLayout(2, layout)
    one: gl.constexpr = gl.SliceLayout(1, rows)
    _, scales, _, stride, head = plane
    token = gl.arange(0, layout.shape[1], gl.SliceLayout(0, rows))[None, :] * (1 if IS_KEY else 2)
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    # Pages and tiles begin with whole words.
    first = gl.convert_layout(page, one).to(gl.int64)[:, None] * (stride // 2)
    first = first + gl.convert_layout(inside * (STRIDE * COUNT) // 2, one)[:, None]
    there = (scales.to(gl.pointer_type(gl.int32)) + first)[:, :, None] + word
    left = gl.convert_layout(live, one)[:, None] - token
    loaded = ()
    for i in gl.static_range(len(places_of(IS_KEY))):
        if COUNT * STRIDE % 2 == 1:
            at = there + ((token + places_of(IS_KEY)[i]) * STRIDE + head)[:, :, None] // 2
        else:
            at = there + (token * STRIDE * COUNT + head * COUNT)[:, :, None] // 2
            at = at + places_of(IS_KEY)[i] * STRIDE * COUNT // 2
        mask = (left > places_of(IS_KEY)[i])[:, :, None]
        loaded = loaded + (gl.load(at, mask=mask, other=0),)
    return loaded


@gluon.jit
def _column(places, i: gl.constexpr):
    """Returns word i of each of `places_of`."""
    words = ()
    for place in gl.static_range(len(places)):
        words = words + (_word(places[place], i),)
    return words


@gluon.jit
def _word(x, i: gl.constexpr):
    """Returns [W, T], word i of [W, T, words]."""
    W: gl.constexpr = x.shape[0]
    T: gl.constexpr = x.shape[1]
    WORDS: gl.constexpr = x.shape[2]
    if WORDS == 1:
        return x.reshape([W, T])
    else:
        even, odd = gl.split(x.reshape([W, T, WORDS // 2, 2]))
        if i % 2 == 0:
            return _word(even, i // 2)
        else:
            return _word(odd, i // 2)


@gluon.jit
def _by_token(first, other, tokens: gl.constexpr):
    """Returns [W, TOKENS] in layout `tokens` of those of the first and the other tokens, [W, 8]."""
    x = gl.join(first, other).permute((0, 2, 1)).reshape([first.shape[0], TOKENS])
    return gl.convert_layout(x, tokens)


@gluon.jit
def scales_of(
    places, head, STRIDE: gl.constexpr, COUNT: gl.constexpr, tokens: gl.constexpr
):  # fmt: skip
    """Returns what `load_scales` loaded of keys as a tuple of COUNT float32 [W, TOKENS] in layout
    `tokens`."""
    scales = ()
    if COUNT == 1:
        token = gl.arange(0, TOKENS, gl.SliceLayout(0, tokens))[None, :]
        shift = 16 - (token * (STRIDE % 2) + head) % 2 * 16
        words = _by_token(_word(places[0], 0), _word(places[1], 0), tokens)
        scales = (((words << shift) & -65536).to(gl.float32, bitcast=True),)
    else:
        for i in gl.static_range(COUNT // 2):
            words = _by_token(_word(places[0], i), _word(places[1], i), tokens)
            low = (words << 16).to(gl.float32, bitcast=True)
            scales = scales + (low, (words & -65536).to(gl.float32, bitcast=True))
    return scales


@gluon.jit
def by_halves(even, odd):
    """Returns the low halves of two words in one, and the high ones."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
        "=&r,=r,r,r",
        [even, odd],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _chosen(even, odd, which):
    """Returns those bytes of two words in one that `which` tells."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        [even, odd, which],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _as_pairs(first, other, tokens: gl.constexpr):
    """Returns [W, TOKENS / 2] of those of the first and of the other tokens, [W, 4]."""
    x = gl.join(first, other).permute((0, 2, 1)).reshape([first.shape[0], TOKENS // 2])
    return gl.convert_layout(x, tokens)


@gluon.jit
def scale_pairs(places, head, STRIDE: gl.constexpr, COUNT: gl.constexpr, tokens: gl.constexpr):
    """Returns what `load_scales` loaded of values as a tuple of COUNT [W, TOKENS / 2] in layout
    `tokens`, each two tokens' bfloat16."""
    scales = ()
    if COUNT == 1:
        which = gl.where(head % 2 == 1, 0x32, 0x10)
        which = which + gl.where((head + STRIDE) % 2 == 1, 0x7600, 0x5400)
        words = _column(places, 0)
        which = words[0] * 0 + which
        first = _chosen(words[0], words[1], which)
        scales = (_as_pairs(first, _chosen(words[2], words[3], which), tokens),)
    else:
        for i in gl.static_range(COUNT // 2):
            words = _column(places, i)
            low, high = by_halves(words[0], words[1])
            other_low, other_high = by_halves(words[2], words[3])
            scales = scales + (_as_pairs(low, other_low, tokens),)
            scales = scales + (_as_pairs(high, other_high, tokens),)
    return scales


@gluon.constexpr_function
def _quads(warps: int) -> gl.DistributedLinearLayout:
    """Of [W, 8, 4]: eight times four threads."""
    lanes = [[0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([], lanes, warp_bases(warps), [], [warps, 8, 4])


@gluon.jit
def scale_rows(places, COUNT: gl.constexpr, mma: gl.constexpr):
    """Returns what `load_scales` loaded of keys as products take them: for each four scales
    [W, TOKENS, 16], of which columns 8 r + b, 8 r + 2 + b ... have scale 2 r + b. Nothing if it is
    one."""
    found = ()
    if COUNT > 1:
        for i in gl.static_range((COUNT + 3) // 4):
            first, other = _spread(places, 2 * i, COUNT), _spread(places, 2 * i + 1, COUNT)
            low, high = gl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, $2;",
                "=h,=h,r",
                [gl.join(first, other)],
                dtype=(gl.bfloat16, gl.bfloat16),
                is_pure=True,
                pack=1,
            )
            x = gl.join(low, high).permute((0, 3, 1, 4, 2, 5))
            x = x.reshape([x.shape[0], TOKENS, 16])
            found = found + (gl.convert_layout(x, gl.DotOperandLayout(0, mma, 2)),)
    return found


@gluon.jit
def _spread(places, i: gl.constexpr, COUNT: gl.constexpr):
    """Returns word i of each token for four threads each, [W, 8, 4, 2], 0 if there is none."""
    W: gl.constexpr = places[0].shape[0]
    quads: gl.constexpr = _quads(W)
    if 2 * i < COUNT:
        first = gl.convert_layout(_word(places[0], i), gl.SliceLayout(2, quads))
        other = gl.convert_layout(_word(places[1], i), gl.SliceLayout(2, quads))
    else:
        first = gl.zeros([W, 8], gl.int32, gl.SliceLayout(2, quads))
        other = first
    first = first.expand_dims(2).broadcast_to([W, 8, 4])
    return gl.join(first, other.expand_dims(2).broadcast_to([W, 8, 4]))
