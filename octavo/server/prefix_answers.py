"""What a client is told of a prompt's prefix: numbers, the place where it parts, and why.

Called by `routes.explaining`. Never asks the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from octavo.errors import RequestError
from octavo.kv_cache.explain import SHOWN_TOKENS, PrefixExplanation, Reason
from octavo.server.tokenising import Tokenising

MESSAGES: dict[Reason, str] = {
    "whole": "all of it is cached but its last tokens, which are always computed",
    "off": "this request does not read the cache: prefix_caching, prompt_logprobs or the server's "
    "--prefix-caching says so",
    "too_short": "it has no full block beside its last token, and only full blocks are cached",
    "computing": "another request is computing what follows: one that came now would wait for it",
    "evicted": "what follows was computed, but its memory was needed for others, or it was reset",
    "goes_on": "it goes on where the nearest prompt and its answer end; what follows is new",
    "parts": "it parts from the nearest prompt at parts_at.token",
    "other_salt": "the same beginning is cached under another cache_salt of this key",
    "new": "nothing is known of what follows: it was never computed, or too long ago",
}


async def explanation_body(
    found: PrefixExplanation, prompt: Sequence[int], tokenising: Tokenising
) -> dict[str, Any]:
    """Returns the answer; texts are null where there is no tokenizer."""
    body: dict[str, Any] = {
        "object": "prefix_explanation",
        "num_tokens": found.num_tokens,
        "cached_tokens": found.num_cached,
        "block_size": found.block_size,
        "reason": found.reason,
        "message": MESSAGES[found.reason],
        "nearest": None,
        "parts_at": None,
        "other_salt_tokens": found.num_other_salt or None,
    }
    if not found.num_shared:
        return body
    body["nearest"] = {"num_tokens": found.num_nearest, "shared_tokens": found.num_shared}
    place, first = found.num_shared, found.num_shared - found.shown_from
    start = max(0, place - SHOWN_TOKENS)
    texts = {
        "before": prompt[start:place],
        "prompt": prompt[place : place + SHOWN_TOKENS],
        "cached": found.shown_ids[first:],
    }
    told = {name: await _text(ids, tokenising) for name, ids in texts.items()}
    return {**body, "parts_at": {"token": place, **told}}


async def _text(ids: Sequence[int], tokenising: Tokenising) -> str | None:
    try:
        return await tokenising.decode(list(ids), skip_special_tokens=False)
    except RequestError:
        return None
