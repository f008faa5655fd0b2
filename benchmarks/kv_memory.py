"""How much of the KV memory models whose layers are not alike hold, measured on the pool.

    python benchmarks/kv_memory.py > memory.json

Runs one sequence through scheduler and KV cache, without a model: a prompt in chunks, then decodes
up to the length. Counted are the bytes of all pages that are held after each step was scheduled,
and beside them those of the same layers in one table, none of them ever forgetting anything. Bytes
of KV are those of bfloat16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np

from octavo.formats import kv_format
from octavo.kv_cache.manager import KVCacheManager
from octavo.kv_cache.planner import chunks_of_sequence
from octavo.kv_cache.prefix_index import prefix_root
from octavo.kv_cache.spec import KVSpec, attention_kv, group_layers
from octavo.request import Request, SamplingParams, pack_ids
from octavo.scheduler import Scheduler, SchedulerLimits
from octavo.step import StepPlan, StepResult
from octavo.visibility import Chunk, Full, Visibility, Window

BLOCK_SIZE, STEP_TOKENS, NUM_DECODES = 16, 8192, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """The layers of a model, and the length at which it is measured."""

    num_kv_heads: int
    head_size: int
    layers: tuple[Visibility, ...]
    length: int

    def specs(self) -> tuple[KVSpec, ...]:
        bfloat16 = kv_format("bfloat16")
        sizes = self.num_kv_heads, self.head_size
        return tuple(attention_kv(*sizes, bfloat16, visibility=one) for one in self.layers)


def every(num_layers: int, period: int, full: Visibility, other: Visibility) -> tuple:
    """Every `period`-th layer is `full`."""
    return tuple(full if (i + 1) % period == 0 else other for i in range(num_layers))


PATTERNS = {
    "gpt-oss-20b": Pattern(
        num_kv_heads=8, head_size=64, layers=every(24, 2, Full(), Window(128)), length=32_768
    ),
    "Llama-4-Scout": Pattern(
        num_kv_heads=8, head_size=128, layers=every(48, 4, Full(), Chunk(8192)), length=131_072
    ),
    "Gemma-3-27B": Pattern(
        num_kv_heads=16, head_size=128, layers=every(62, 6, Full(), Window(1024)), length=32_768
    ),
}


def held_bytes(specs: tuple[KVSpec, ...], length: int) -> dict[str, int]:
    """Returns the most bytes held until the prompt's steps are committed, and while the last tokens
    are decoded."""
    groups = group_layers(specs)
    prompt_len = length - NUM_DECODES
    manager = KVCacheManager(
        groups,
        num_chunks=chunks_of_sequence(groups, length, BLOCK_SIZE, STEP_TOKENS),
        block_size=BLOCK_SIZE,
        max_rows=1,
        max_model_len=length,
    )
    limits = SchedulerLimits(
        max_num_seqs=1, max_num_batched_tokens=STEP_TOKENS, max_model_len=length
    )
    scheduler = Scheduler(manager, limits)
    request = Request(
        request_id="one",
        packed_prompt=pack_ids(i * i % 50_021 for i in range(prompt_len)),
        params=SamplingParams(temperature=0.0, max_tokens=NUM_DECODES, ignore_eos=True),
    )
    scheduler.add(request, prefix_root(model="bench"), True, [0])
    prefill, decode = 0, 0
    launched: StepPlan | None = None
    while scheduler.has_unfinished:
        plan = scheduler.schedule()
        held = manager.pools.used_bytes
        # What a chunk computed is held until it is committed.
        is_prompt = any(one is not None and one.num_tokens > 1 for one in (launched, plan))
        if is_prompt:
            prefill = max(prefill, held)
        elif plan is not None:
            decode = max(decode, held)
        if launched is not None:
            scheduler.commit(launched, _answer(launched))
        launched = plan
    return {"groups": len(groups), "prefill_bytes": prefill, "decode_bytes": decode}


def _answer(plan: StepPlan) -> StepResult:
    tokens = np.full(int(plan.samples.sum()), 7, np.int32)
    return StepResult.single(plan, tokens)


def measure(pattern: Pattern) -> dict[str, float]:
    """Returns what is held, and the shares of what one table for all layers holds."""
    found = held_bytes(pattern.specs(), pattern.length)
    alike = replace(pattern, layers=(Full(),) * len(pattern.layers))
    one_table = held_bytes(alike.specs(), pattern.length)["decode_bytes"]
    return {
        "length": pattern.length,
        **found,
        "one_table_bytes": one_table,
        "decode_share": found["decode_bytes"] / one_table,
        "prefill_share": found["prefill_bytes"] / one_table,
    }


def main() -> None:
    print(json.dumps({name: measure(pattern) for name, pattern in PATTERNS.items()}, indent=2))


if __name__ == "__main__":
    main()
