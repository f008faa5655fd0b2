"""Who is evicted from the prefix cache, and what that costs: ours, LRU and Belady's, as JSON.

    python -m benchmarks.eviction [--seed N] [--traces NAME ...]

One line for each trace of `benchmarks.prefix_traces`, whose requests come one after the other.
Ours is the engine's own KV cache without a model; LRU and Belady's, which knows the future, keep
as many blocks. `hit_share` is of prompt tokens, `gain` is (ours - LRU) / (Belady's - LRU), and
`second_half` tells of the later requests alone.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from array import array
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Protocol

from benchmarks.prefix_traces import BLOCK, TRACES, Chain, chains_of, tokens_of
from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager, SequenceKV
from octavo.kv_cache.news import CacheNews
from octavo.kv_cache.spec import attention_kv, group_layers


class Policy(Protocol):
    def ask(self, place: int) -> int:
        """Serves request `place` of the trace; returns how many of its blocks were cached."""
        ...


class Ours:
    def __init__(
        self,
        token_ids: Sequence[array[int]],
        prompt_tokens: Sequence[int],
        num_blocks: int,
        news: CacheNews | None = None,
    ) -> None:
        """`token_ids`: of prompts, which have so many `prompt_tokens`, and outputs."""
        self.token_ids, self.prompt_tokens = token_ids, prompt_tokens
        spec = attention_kv(1, 1, kv_format("float32"))
        self.manager = KVCacheManager(
            group_layers((spec,)),
            num_chunks=num_blocks + 1,
            block_size=BLOCK,
            max_rows=1,
            max_model_len=max(map(len, token_ids)),
            news=news,
        )

    def ask(self, place: int) -> int:
        ids, prompt_tokens = self.token_ids[place], self.prompt_tokens[place]
        kv = SequenceKV(root=bytes(32))
        hit = self.manager.lookup(kv, ids[:prompt_tokens])
        assert self.manager.admit(kv, 0, hit, prompt_tokens)
        self.manager.publish(kv, ids, prompt_tokens)
        assert self.manager.allocate(kv, prompt_tokens, len(ids))
        self.manager.publish(kv, ids, len(ids))
        self.manager.release([kv])
        return hit.num_blocks


class LRU:
    def __init__(self, requests: Sequence[Chain], num_blocks: int) -> None:
        self.requests, self.num_blocks = requests, num_blocks
        self.cached: OrderedDict[int, None] = OrderedDict()

    def ask(self, place: int) -> int:
        chain = self.requests[place]
        hits = leading(chain, self.cached)
        for block in reversed(chain.blocks):
            self.cached[block] = None
            self.cached.move_to_end(block)
        while len(self.cached) > self.num_blocks:
            self.cached.popitem(last=False)
        return hits


class Belady:
    """Keeps what is asked for soonest."""

    def __init__(self, requests: Sequence[Chain], num_blocks: int) -> None:
        self.requests, self.num_blocks = requests, num_blocks
        self.next_use: dict[int, int] = {}
        """Of the blocks that are cached: the next request for each."""
        self.latest: list[tuple[int, int, int]] = []
        """Of these and of some that are not: next use and place in the prompt, negative; block."""
        self.uses: list[list[int]] = []
        later: dict[int, int] = {}
        for place in reversed(range(len(requests))):
            blocks = requests[place].blocks
            self.uses.append([later.get(block, len(requests)) for block in blocks])
            later.update(dict.fromkeys(blocks, place))
        self.uses.reverse()

    def ask(self, place: int) -> int:
        chain = self.requests[place]
        hits = leading(chain, self.next_use)
        for depth, (block, use) in enumerate(zip(chain.blocks, self.uses[place], strict=True)):
            self.next_use[block] = use
            heapq.heappush(self.latest, (-use, -depth, block))
        while len(self.next_use) > self.num_blocks:
            use, _, block = heapq.heappop(self.latest)
            if self.next_use.get(block) == -use:
                del self.next_use[block]
        return hits


def leading(chain: Chain, cached: Collection[int]) -> int:
    """Returns how many leading blocks of the prompt are cached."""
    findable = chain.blocks[: chain.num_findable]
    return next((i for i, block in enumerate(findable) if block not in cached), len(findable))


def measure(name: str, seed: int) -> dict[str, object]:
    """Returns the shares of prompt tokens that hit, of all requests and of the second half."""
    draw, one_of = TRACES[name]
    trace = draw(random.Random(seed))
    token_ids = [tokens_of(asked) for asked in trace]
    prompt_tokens = [asked.prompt_tokens for asked in trace]
    chains = chains_of(trace)
    prompts = {block for chain in chains for block in chain.blocks[: chain.prompt_tokens // BLOCK]}
    num_blocks = len(prompts) // one_of
    policies: dict[str, Policy] = {
        "ours": Ours(token_ids, prompt_tokens, num_blocks),
        "lru": LRU(chains, num_blocks),
        "belady": Belady(chains, num_blocks),
    }
    found: dict[str, list[int]] = {
        policy: [cache.ask(place) * BLOCK for place in range(len(trace))]
        for policy, cache in policies.items()
    }
    half = len(trace) // 2
    return {
        "cache_blocks": num_blocks,
        **shares("hit_share", "gain", found, prompt_tokens, 0),
        **shares("second_half", "second_half_gain", found, prompt_tokens, half),
    }


def shares(
    name: str, gain: str, found: dict[str, list[int]], prompt_tokens: Sequence[int], first: int
) -> dict[str, object]:
    """Returns what share of the tokens of requests from `first` on hit, and the gain."""
    total = sum(prompt_tokens[first:])
    share = {policy: sum(tokens[first:]) / total for policy, tokens in found.items()}
    room = share["belady"] - share["lru"]
    return {
        name: {policy: round(one, 4) for policy, one in share.items()},
        gain: round((share["ours"] - share["lru"]) / room, 4) if room else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", nargs="+", choices=TRACES, default=TRACES)
    options = parser.parse_args()
    for name in options.traces:
        row = {"bench": "eviction", "trace": name, "seed": options.seed}
        print(json.dumps({**row, **measure(name, options.seed)}), flush=True)


if __name__ == "__main__":
    main()
