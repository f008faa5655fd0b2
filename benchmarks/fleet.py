"""How well a fleet's router keeps prefixes together and engines evenly busy, as JSON.

    python -m benchmarks.fleet [--engines N] [--requests N] [--seed N]

The trace is the first of `benchmarks.prefix_traces` (questions about documents under system
prompts, by Zipf's law); every engine is the engine's own KV cache without a model, and computes so
many tokens a second. Requests come at random, at a share of what all engines can do. `hit_ratio` is
the hit rate over that of one cache as large as all; `spread` is how far the busiest or idlest
engine's computed tokens are from an even share. Beside our router: by turns, at random, the least
loaded.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.eviction import Ours
from benchmarks.prefix_traces import (
    BLOCK,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    question,
    questions,
    tokens_of,
)
from octavo.fleet.router import Ask, Router
from octavo.kv_cache.hash_memory import hash_of
from octavo.kv_cache.journal import Journal
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.prefix_index import Digester

RATE = 20_000.0
"""Tokens that an engine computes in a second."""
BUSY_SHARE = 0.7
CACHE_SHARE = 3
"""One cache of a fleet's size holds one in so many of all prefixes."""


@dataclass(frozen=True)
class Outcome:
    hit_share: float
    computed: tuple[int, ...]
    """Tokens that each engine computed."""

    @property
    def spread(self) -> float:
        """The largest distance from an even share, as a part of it."""
        even = sum(self.computed) / len(self.computed)
        return max(abs(one - even) for one in self.computed) / even


Choose = Callable[[int, Ask, Router], str]


def by_router(place: int, ask: Ask, router: Router) -> str:
    choice = router.route(ask)
    assert choice is not None
    return choice.name


def by_turns(place: int, ask: Ask, router: Router) -> str:
    names = router.names
    return names[place % len(names)]


def at_random(place: int, ask: Ask, router: Router) -> str:
    return random.Random(f"{place}").choice(router.names)


def least_loaded(place: int, ask: Ask, router: Router) -> str:
    return min(router.names, key=router.work_of)


POLICIES: dict[str, Choose] = {
    "ours": by_router,
    "turns": by_turns,
    "random": at_random,
    "least_loaded": least_loaded,
}


def digests_of(token_ids: Sequence[array[int]]) -> list[list[int]]:
    digester, found = Digester(), []
    for ids in token_ids:
        digests: list[bytes] = []
        digester.extend(digests, bytes(32), ids[:PROMPT_TOKENS], BLOCK)
        found.append([hash_of(digest) for digest in digests])
    return found


def run(
    token_ids: Sequence[array[int]],
    hashes: Sequence[Sequence[int]],
    num_engines: int,
    num_blocks: int,
    choose: Choose = by_router,
    seed: int = 0,
    tells: bool = True,
) -> Outcome:
    """Serves a trace with engines of `num_blocks` blocks each. `tells`: whether they tell the
    router what they hold; else it knows what it sent."""
    names = [str(number) for number in range(num_engines)]
    news = {name: CacheNews((0,), BLOCK) for name in names if tells}
    lengths = [PROMPT_TOKENS] * len(token_ids)
    caches = {name: Ours(token_ids, lengths, num_blocks, news.get(name)) for name in names}
    journal = Journal(0)
    router = Router(BLOCK)
    for name in names:
        router.join(name, num_blocks)
    rng = random.Random(seed)
    mean = (PROMPT_TOKENS / 2 + OUTPUT_TOKENS) / (RATE * num_engines * BUSY_SHARE)
    free_at, computed = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    under_way: list[tuple[float, str]] = []
    now, num_hits = 0.0, 0
    for place in range(len(token_ids)):
        now += rng.expovariate(1 / mean)
        while under_way and under_way[0][0] <= now:
            router.end(heapq.heappop(under_way)[1])
        ask = Ask(
            request_id=str(place),
            num_tokens=PROMPT_TOKENS,
            num_outputs=OUTPUT_TOKENS,
            hashes=hashes[place],
        )
        name = choose(place, ask, router)
        if choose is not by_router:
            router.send(name, ask, OUTPUT_TOKENS)
        hits = caches[name].ask(place) * BLOCK
        if tells:
            journal.note(news[name].take())
        if changes := journal.take():
            router.removed(name, array("Q", changes.removed))
            router.stored(name, array("Q", changes.stored))
        work = PROMPT_TOKENS - hits + OUTPUT_TOKENS
        num_hits += hits
        computed[name] += work
        free_at[name] = max(free_at[name], now) + work / RATE
        heapq.heappush(under_way, (free_at[name], ask.request_id))
    share = num_hits / (PROMPT_TOKENS * len(token_ids))
    return Outcome(share, tuple(computed.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", type=int, default=4)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    trace = questions(random.Random(args.seed), args.requests, 0)
    token_ids = [tokens_of(question(one, place)) for place, one in enumerate(trace)]
    hashes = digests_of(token_ids)
    each = len({one for chain in hashes for one in chain}) // CACHE_SHARE // args.engines
    whole = run(token_ids, hashes, 1, each * args.engines, by_turns)
    runs = [(name, choose, True) for name, choose in POLICIES.items()]
    for name, choose, tells in [*runs, ("ours_untold", by_router, False)]:
        found = run(token_ids, hashes, args.engines, each, choose, args.seed, tells)
        row = {
            "bench": "fleet",
            "policy": name,
            "engines": args.engines,
            "seed": args.seed,
            "cache_blocks": each,
            "hit_share": round(found.hit_share, 4),
            "one_cache": round(whole.hit_share, 4),
            "hit_ratio": round(found.hit_share / whole.hit_share, 4),
            "spread": round(found.spread, 4),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
