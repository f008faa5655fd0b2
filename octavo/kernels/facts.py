"""Numbers of the GPU's kernels that decide how much memory a step takes. No torch.

Used by the kernels themselves and by those who plan without loading one, so that both count alike.
"""

from __future__ import annotations

from functools import lru_cache

SPLIT_CLASSES = ((1024, 64), (4096, 128), (16384, 256))
"""(visible tokens at most, tokens of a split) of decodes; longer ones have LARGEST_SPLIT."""
LARGEST_SPLIT = 512

SHORT_SPLITS = 16
"""The most splits of a short chunk's keys."""
SHORT_TOKENS = 512
"""The buffer of partial results holds SHORT_SPLITS of so many tokens, or fewer of more."""
SHORT_NUMBERS = 128 * 64 * 128
"""Numbers of a split of all those tokens at most, over latent vectors: tiles of few tokens and many
heads fill the processors without more splits."""
SHARED_SPLITS = 16
"""The most splits of a prefix that decodes share: more leave too much to merge."""
LONE_PROGRAMS = 132
"""Programs that attend single queries at a time over latent vectors: as many as an H100 has
processors. Those of a row share its keys, and leave a partial result each."""
EXPANDED_TOKENS = 16_384
"""Tokens whose keys and values are multiplied out of latent vectors at once."""
DETERMINISTIC_TOKENS = 256
"""Prompt tokens that share one buffer of partial results in the deterministic mode, where each has
the splits of a decode."""

UNPACKED_BYTES = 512 << 20
"""Of keys and values that are plain numbers for one layer, where the cache keeps them in a format
with scales and a step has chunks of many queries."""

PEER_BYTES = 72 << 20
"""Of a rank's memory that other ranks write into: two sums of 8,192 rows of 2,048 numbers of 2
bytes, or fewer of wider ones, and the few rows' own place."""

UNPACKED_TOKENS = 512
"""From here on a packed matrix is made numbers, rather than anew for every tile of tokens."""
UNPACKED_ROWS = 512
"""Of an expert, in the mean: beyond, packed experts are made numbers once a layer; and where it is
so many, if numbers take UNPACKED_ROOM bytes at most."""
UNPACKED_ROOM = 512 << 20
UNPACKED_PARTS = 2
"""In which gate and up of the experts are, one after the other: each takes as much as all of down
does after them."""


def unpacks_experts(num_pairs: int, num_experts: int, inner_size: int, hidden_size: int) -> bool:
    """Returns whether packed experts of these sizes are made numbers once a layer for so many pairs
    of token and expert. Large ones are not for long documents in steps of 2,048 tokens, which leave
    their memory to the cache."""
    rows = num_pairs / num_experts
    if 2 * num_experts * inner_size * hidden_size <= UNPACKED_ROOM:
        return rows >= UNPACKED_ROWS
    return rows > UNPACKED_ROWS


def short_tokens(num_heads: int, partial_size: int) -> int:
    """Returns of how many tokens the buffer of short chunks' partial results holds all splits, over
    latent vectors."""
    return max(16, min(SHORT_TOKENS, SHORT_NUMBERS // (num_heads * partial_size)))


@lru_cache
def split_partials(max_visible: int) -> int:
    """Returns how many partial results a row with up to `max_visible` tokens may need: one more
    than it has splits, as the first may begin between two edges."""
    edges = [min(max_visible, limit) for limit, _ in SPLIT_CLASSES] + [max_visible]
    sizes = [size for _, size in SPLIT_CLASSES] + [LARGEST_SPLIT]
    return 1 + max(-(-seen // size) for seen, size in zip(edges, sizes, strict=True))


def lone_partials(num_rows: int, max_visible: int) -> int:
    """Returns how many partial results each of `num_rows` single queries may leave over latent
    vectors, where programs share its keys: it has that many programs at most."""
    return min(split_partials(max_visible), max(1, LONE_PROGRAMS // num_rows))


def most_lone_partials(num_rows: int, max_visible: int) -> int:
    """Returns the most partial results of up to `num_rows` single queries together: those of
    `lone_partials`, and of what they share."""
    alone = min(max(num_rows, LONE_PROGRAMS), num_rows * split_partials(max_visible))
    return num_rows * SHARED_SPLITS + alone
