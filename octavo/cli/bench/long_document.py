"""Many requests over one long document, driven step by step: what workload L128 measures.

Used by `octavo bench workloads`. The document is in the cache before.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.engine.core import EngineCore
from octavo.request import Request, SamplingParams, pack_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRun:
    """What requests took that were there at once."""

    seconds: float
    """Until the last token."""
    prompt_seconds: float
    """Until each had its first token."""
    later_tokens: int
    """Tokens that came after that, in the rest of the seconds."""
    waste_share: float
    """Of the slots of used KV blocks that hold no token, when all prompts were in."""

    @property
    def later_rate(self) -> float:
        """Output tokens a second once all prompts are in."""
        return self.later_tokens / (self.seconds - self.prompt_seconds)


def run_shared(core: EngineCore, prompts: Sequence[Sequence[int]], outputs: int) -> SharedRun:
    """Runs all prompts side by side, `outputs` (at least 2) tokens each, whatever they are."""
    params = SamplingParams(temperature=1.0, max_tokens=outputs, ignore_eos=True, detokenize=False)
    made = {f"shared-{index}": 0 for index in range(len(prompts))}
    began = time.perf_counter()
    for name, ids in zip(made, prompts, strict=True):
        core.add(Request(request_id=name, packed_prompt=pack_ids(ids), params=params))
    prompt_seconds, waste, before = 0.0, 0.0, 0
    while core.has_work:
        for delta in core.step():
            made[delta.request_id] += len(delta.token_ids)
        if not prompt_seconds and min(made.values()) > 0:
            prompt_seconds = time.perf_counter() - began
            waste, before = core.stats().waste_share, sum(made.values())
    return SharedRun(
        seconds=time.perf_counter() - began,
        prompt_seconds=prompt_seconds,
        later_tokens=sum(made.values()) - before,
        waste_share=waste,
    )
