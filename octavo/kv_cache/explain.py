"""Says what of a prompt is cached now, where it parts from what is cached, and why.

Called by the engine core for a tenant that asks about a prompt of its own. Tells of one root alone
(of other roots of the same tenant that they are there), and changes nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.recent_prompts import RecentPrompt, num_equal
from octavo.kv_cache.records import SequenceKV

Reason = Literal[
    "whole", "off", "too_short", "computing", "evicted", "goes_on", "parts", "other_salt", "new"
]
SHOWN_TOKENS = 32
"""Of the nearest prompt, on either side of where it parts."""
_COMPARED_TOKENS = 4096
_COMPARED_PROMPTS = 16
"""Of other roots, whose digests say nothing here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixExplanation:
    """What of a prompt is cached, in tokens."""

    num_tokens: int
    num_cached: int
    block_size: int
    reason: Reason
    num_shared: int = 0
    """With the nearest prompt that was computed; 0: nothing is known of any."""
    num_nearest: int = 0
    """Tokens of that one, its answer among them."""
    shown_from: int = 0
    shown_ids: tuple[int, ...] = ()
    """Of the nearest prompt, around where it parts."""
    num_other_salt: int = 0
    """That are alike under another salt, as far as was looked."""


def explain(
    manager: KVCacheManager,
    kv: SequenceKV,
    token_ids: array[int],
    siblings: Iterable[RecentPrompt],
    others: Iterable[RecentPrompt],
) -> PrefixExplanation:
    """Explains a prompt that nobody computes for now: `kv` is a fresh one. `siblings` are the
    recent prompts of its root, `others` those of the tenant's other roots.

    Costs as much as the lookup of a prompt, and a search in the digests of each sibling.
    """
    size = manager.block_size
    hit = manager.lookup(kv, token_ids)
    manager.digest(kv, token_ids)
    most = (len(token_ids) - 1) // size
    cached = hit.num_blocks * size
    if not kv.reads_cache or not most or hit.num_blocks == most:
        reason: Reason = "too_short" if kv.reads_cache else "off"
        return PrefixExplanation(
            num_tokens=len(token_ids),
            num_cached=cached,
            block_size=size,
            reason="whole" if hit.num_blocks and hit.num_blocks == most else reason,
        )
    shared, nearest = _nearest(token_ids, kv.digests, siblings, size)
    is_known = nearest is not None and shared >= max(cached, 1)
    elsewhere = 0 if is_known else _elsewhere(token_ids, others)
    shown = range(0)
    if nearest is not None and is_known:
        last = min(len(nearest.token_ids), shared + SHOWN_TOKENS)
        shown = range(max(0, shared - SHOWN_TOKENS), last)
    if hit.is_computing:
        reason = "computing"
    elif hit.miss_reason == "evicted" or (
        nearest is not None and shared >= cached + size and nearest.num_blocks > hit.num_blocks
    ):
        reason = "evicted"
    elif nearest is not None and is_known:
        reason = "goes_on" if shared == len(nearest.token_ids) else "parts"
    else:
        reason = "other_salt" if elsewhere > cached else "new"
    return PrefixExplanation(
        num_tokens=len(token_ids),
        num_cached=cached,
        block_size=size,
        reason=reason,
        num_shared=shared if is_known else 0,
        num_nearest=len(nearest.token_ids) if nearest is not None and is_known else 0,
        shown_from=shown.start,
        shown_ids=tuple(nearest.token_ids[shown.start : shown.stop]) if nearest else (),
        num_other_salt=elsewhere if reason == "other_salt" else 0,
    )


def _nearest(
    token_ids: array[int], digests: list[bytes], prompts: Iterable[RecentPrompt], size: int
) -> tuple[int, RecentPrompt | None]:
    """Returns the prompt that shares most tokens, and how many; of equals the newest."""
    best: tuple[int, RecentPrompt | None] = (0, None)
    for one in prompts:
        shared = one.num_shared(token_ids, digests, size)
        if shared and shared >= best[0]:
            best = shared, one
    return best


def _elsewhere(token_ids: array[int], others: Iterable[RecentPrompt]) -> int:
    newest = list(others)[-_COMPARED_PROMPTS:]
    return max((num_equal(one.token_ids, token_ids, _COMPARED_TOKENS) for one in newest), default=0)
