"""Who is evicted from the prefix cache, and what that costs: ours, LRU and Belady's, as JSON.

    python -m benchmarks.eviction [--seed N]

Requests ask questions about documents under system prompts, all by Zipf's law, one after the other.
Ours is the engine's own KV cache without a model; LRU and Belady's, which knows the future, keep
the same number of blocks. `gain` is (ours - LRU) / (Belady's - LRU). In the second trace all
prompts change half-way: what was useful until then is dead; `second_half` tells how long it stays.
"""

from __future__ import annotations

import argparse
import json
import random
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Protocol

from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager, SequenceKV
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.spec import attention_kv, group_layers

BLOCK = 16
SYSTEMS, DOCUMENTS, QUESTIONS = 8, 60, 25
SYSTEM_TOKENS, DOCUMENT_TOKENS, QUESTION_TOKENS, OUTPUT_TOKENS = 256, 1024, 56, 16
PROMPT_TOKENS = SYSTEM_TOKENS + DOCUMENT_TOKENS + QUESTION_TOKENS
NUM_REQUESTS = 2000
Request = tuple[int, ...]
"""The prefixes of a request, one number a full block, its output's last."""


class Policy(Protocol):
    def ask(self, place: int) -> int:
        """Serves request `place` of the trace; returns how many of its blocks were cached."""
        ...


def zipf(rng: random.Random, count: int) -> int:
    weights = list(accumulate(1 / rank for rank in range(1, count + 1)))
    return rng.choices(range(count), cum_weights=weights)[0]


def questions(rng: random.Random, count: int, era: int) -> Iterator[tuple[int, int, int, int]]:
    for _ in range(count):
        yield era, zipf(rng, SYSTEMS), zipf(rng, DOCUMENTS), zipf(rng, QUESTIONS)


def tokens_of(question: tuple[int, int, int, int], output: int) -> array[int]:
    """Returns ids of prompt and output: equal exactly where both come from the same texts."""
    era, system, document, _ = question
    parts = (
        (SYSTEM_TOKENS, (era, system)),
        (DOCUMENT_TOKENS, (era, system, document)),
        (QUESTION_TOKENS, question),
        (OUTPUT_TOKENS, (*question, output)),
    )
    ids = array("i")
    for length, name in parts:
        rng = random.Random(repr(name))
        ids.extend(rng.randrange(50_000) for _ in range(length))
    return ids


def prefixes(token_ids: Sequence[array[int]]) -> list[Request]:
    """Numbers the distinct prefixes of all requests, in whole blocks."""
    numbers: dict[tuple[int, bytes], int] = {}
    found = []
    for ids in token_ids:
        chain, parent = [], -1
        for start in range(0, len(ids) // BLOCK * BLOCK, BLOCK):
            key = (parent, ids[start : start + BLOCK].tobytes())
            parent = numbers.setdefault(key, len(numbers))
            chain.append(parent)
        found.append(tuple(chain))
    return found


class Ours:
    def __init__(
        self, token_ids: Sequence[array[int]], num_blocks: int, news: CacheNews | None = None
    ) -> None:
        self.token_ids = token_ids
        spec = attention_kv(1, 1, kv_format("float32"))
        self.manager = KVCacheManager(
            group_layers((spec,)),
            num_chunks=num_blocks + 1,
            block_size=BLOCK,
            max_rows=1,
            max_model_len=PROMPT_TOKENS + OUTPUT_TOKENS,
            news=news,
        )

    def ask(self, place: int) -> int:
        ids = self.token_ids[place]
        kv = SequenceKV(root=bytes(32))
        hit = self.manager.lookup(kv, ids[:PROMPT_TOKENS])
        assert self.manager.admit(kv, 0, hit, PROMPT_TOKENS)
        self.manager.publish(kv, ids, PROMPT_TOKENS)
        assert self.manager.allocate(kv, PROMPT_TOKENS, len(ids))
        self.manager.publish(kv, ids, len(ids))
        self.manager.release([kv])
        return hit.num_blocks


class LRU:
    def __init__(self, requests: Sequence[Request], num_blocks: int) -> None:
        self.requests, self.num_blocks = requests, num_blocks
        self.cached: OrderedDict[int, None] = OrderedDict()

    def ask(self, place: int) -> int:
        chain = self.requests[place]
        hits = leading(chain, self.cached)
        for block in reversed(chain):
            self.cached[block] = None
            self.cached.move_to_end(block)
        while len(self.cached) > self.num_blocks:
            self.cached.popitem(last=False)
        return hits


class Belady:
    """Keeps what is asked for soonest."""

    def __init__(self, requests: Sequence[Request], num_blocks: int) -> None:
        self.requests, self.num_blocks = requests, num_blocks
        self.cached: set[int] = set()
        self.uses: dict[int, list[int]] = {}
        for place in reversed(range(len(requests))):
            for block in requests[place]:
                self.uses.setdefault(block, []).append(place)

    def ask(self, place: int) -> int:
        chain = self.requests[place]
        hits = leading(chain, self.cached)
        self.cached.update(chain)
        for block in chain:
            self.uses[block].pop()
        by_use = sorted(self.cached, key=lambda block: (self._next_use(block), block))
        self.cached = set(by_use[: self.num_blocks])
        return hits

    def _next_use(self, block: int) -> int:
        return self.uses[block][-1] if self.uses[block] else len(self.requests)


def leading(chain: Request, cached: OrderedDict[int, None] | set[int]) -> int:
    """Returns how many leading blocks of the prompt are cached, its last token left to compute."""
    limit = (PROMPT_TOKENS - 1) // BLOCK
    return next((i for i, block in enumerate(chain[:limit]) if block not in cached), limit)


def measure(trace: list[tuple[int, int, int, int]]) -> dict[str, object]:
    """Returns the shares of prompt tokens that hit, of all requests and of the second half."""
    token_ids = [tokens_of(question, place) for place, question in enumerate(trace)]
    requests = prefixes(token_ids)
    prompts = {block for chain in requests for block in chain[: PROMPT_TOKENS // BLOCK]}
    num_blocks = len(prompts) // 3
    policies: dict[str, Policy] = {
        "ours": Ours(token_ids, num_blocks),
        "lru": LRU(requests, num_blocks),
        "belady": Belady(requests, num_blocks),
    }
    shares: dict[str, float] = {}
    halves: dict[str, float] = {}
    for name, policy in policies.items():
        hits = [policy.ask(place) * BLOCK / PROMPT_TOKENS for place in range(len(trace))]
        shares[name] = sum(hits) / len(hits)
        halves[name] = sum(hits[len(hits) // 2 :]) / (len(hits) - len(hits) // 2)
    return {
        "cache_blocks": num_blocks,
        "hit_share": {name: round(share, 4) for name, share in shares.items()},
        "gain": round(gain(shares), 4),
        "second_half": {name: round(share, 4) for name, share in halves.items()},
        "second_half_gain": round(gain(halves), 4),
    }


def gain(shares: dict[str, float]) -> float:
    return (shares["ours"] - shares["lru"]) / (shares["belady"] - shares["lru"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    rng = random.Random(seed)
    half = NUM_REQUESTS // 2
    traces = {
        "zipf": [*questions(rng, NUM_REQUESTS, 0)],
        "reuse_ends": [*questions(rng, half, 0), *questions(rng, half, 1)],
    }
    for name, trace in traces.items():
        print(json.dumps({"bench": "eviction", "trace": name, "seed": seed, **measure(trace)}))


if __name__ == "__main__":
    main()
