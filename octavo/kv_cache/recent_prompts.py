"""Remembers the tokens of prompts and answers that were computed last: the prefix index knows their
digests alone, which cannot say where two texts part.

Filled by the scheduler when a sequence ends, read by `explain`. Bounded in tokens, and in prompts
of one root; holds references, never copies.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass

MAX_TOKENS = 2**21
MAX_PROMPTS = 64
"""Of one root: what is compared with each that ends."""


@dataclass(frozen=True, slots=True, eq=False)
class RecentPrompt:
    """The tokens of one sequence, of which the blocks of `digests` up to `num_blocks` were
    published."""

    tenant: str
    root: bytes
    token_ids: array[int]
    digests: list[bytes]
    num_blocks: int

    def continues(self, other: RecentPrompt) -> bool:
        """Whether it has all blocks of `other`."""
        last = other.num_blocks - 1
        return last < self.num_blocks and self.digests[last] == other.digests[last]

    def num_shared(self, token_ids: array[int], digests: list[bytes], block_size: int) -> int:
        """Returns how many tokens `token_ids`, whose blocks have `digests`, begin with as this."""
        both = range(min(self.num_blocks, len(digests)))
        blocks = bisect_left(both, True, key=lambda place: self.digests[place] != digests[place])
        start = blocks * block_size
        end = start + 2 * block_size
        return start + num_equal(self.token_ids[start:end], token_ids[start:end], 2 * block_size)


def num_equal(first: array[int], second: array[int], most: int) -> int:
    """Returns how many tokens two lists begin with alike, `most` at most."""
    count = min(len(first), len(second), most)
    return next((n for n in range(count) if first[n] != second[n]), count)


class RecentPrompts:
    """The newest of all tenants; whoever asks gets those of one root, or of one tenant."""

    def __init__(self, max_tokens: int = MAX_TOKENS, max_prompts: int = MAX_PROMPTS) -> None:
        self._max_tokens = max_tokens
        self._max_prompts = max_prompts
        self._num_tokens = 0
        self._all: OrderedDict[RecentPrompt, None] = OrderedDict()
        """Oldest first."""
        self._of_root: dict[bytes, list[RecentPrompt]] = {}

    def __len__(self) -> int:
        return len(self._all)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def remember(self, new: RecentPrompt) -> None:
        """Takes over a prompt in place of those that it continues; one of no block, or that another
        continues, is not needed."""
        if not new.num_blocks or len(new.token_ids) > self._max_tokens:
            return
        first = new.digests[0]
        siblings = [one for one in self._of_root.get(new.root, ()) if one.digests[0] == first]
        longer = next((one for one in siblings if one.continues(new)), None)
        if longer is not None and not new.continues(longer):
            self._all.move_to_end(longer)
            return
        for one in filter(new.continues, siblings):
            self._forget(one)
        self._all[new] = None
        self._of_root.setdefault(new.root, []).append(new)
        self._num_tokens += len(new.token_ids)
        if len(self._of_root[new.root]) > self._max_prompts:
            self._forget(self._of_root[new.root][0])
        while self._num_tokens > self._max_tokens:
            self._forget(next(iter(self._all)))

    def of_root(self, root: bytes) -> list[RecentPrompt]:
        """Returns the prompts under one root."""
        return list(self._of_root.get(root, ()))

    def of_other_roots(self, tenant: str, root: bytes) -> list[RecentPrompt]:
        """Returns a tenant's prompts under other roots: those of its other salts."""
        return [one for one in self._all if one.tenant == tenant and one.root != root]

    def clear(self) -> None:
        """Forgets all, as the cache does."""
        self._all.clear()
        self._of_root.clear()
        self._num_tokens = 0

    def _forget(self, one: RecentPrompt) -> None:
        del self._all[one]
        siblings = self._of_root[one.root]
        siblings.remove(one)
        if not siblings:
            del self._of_root[one.root]
        self._num_tokens -= len(one.token_ids)
