"""A rank that computes many models one after the other, in step with another rank; run by
test_tensor_parallel_families.py.

`python -m tests.engine.ranks_in_step FOLDER MODEL...` is rank 1. What an engine does depends on its
requests alone, so that ranks with the same ones need not be told of steps: one process is enough
for all models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.load import load_runner
from octavo.grammar import Guides, Vocabulary
from octavo.parallel import Collectives, Meeting, TorchCollectives
from octavo.request import Request, SamplingParams, pack_ids
from octavo.weights.hub import resolve_model
from tests.engine.prompts import prompts_of

PROMPTS = prompts_of((44, 41, 3, 43), seed=2)
NUM_OUTPUTS = 20
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUTS, ignore_eos=True, logprobs=0)
SIZE = 2


class Output(NamedTuple):
    token_ids: list[int]
    logprobs: list[float]


def outputs_of(model: Path, collectives: Collectives) -> tuple[list[Output], int]:
    """Returns what each prompt gives, the first one again when it is cached, and the cached tokens
    of that."""
    config = EngineConfig(
        model=str(model),
        skip_tokenizer_init=True,
        device="cpu",
        attention_backend="reference",
        num_threads=1,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        max_model_len=128,
        kv_cache_memory_bytes=1 << 20,
        tensor_parallel_size=collectives.size,
        step_stretch=0.0,
        poison_freed_blocks=True,
    ).resolve()
    files = resolve_model(str(model))
    runner, plan = load_runner(config, files, collectives)
    core = EngineCore(config, plan, runner, "model", Guides(_no_vocabulary, 1))
    try:
        found = _run(core, PROMPTS)
        before = core.stats().num_cached_prompt_tokens
        found += _run(core, PROMPTS[:1])
        core.check()
        return found, core.stats().num_cached_prompt_tokens - before
    finally:
        core.close()


def _run(core: EngineCore, prompts: Sequence[list[int]]) -> list[Output]:
    outputs = {str(index): Output([], []) for index in range(len(prompts))}
    for request_id, prompt in zip(outputs, prompts, strict=True):
        core.add(Request(request_id=request_id, packed_prompt=pack_ids(prompt), params=PARAMS))
    while core.has_work:
        for delta in core.step():
            output = outputs[delta.request_id]
            output.token_ids.extend(delta.token_ids)
            output.logprobs.extend(one[0].logprob for one in delta.logprobs)
    return list(outputs.values())


def _no_vocabulary() -> Vocabulary:
    raise AssertionError("nobody asks for a grammar")


def main(address: str, *models: str) -> None:
    torch.set_num_threads(1)
    collectives = TorchCollectives(Meeting.at(address, SIZE), 1, torch.device("cpu"))
    for model in models:
        outputs_of(Path(model), collectives)


if __name__ == "__main__":
    main(*sys.argv[1:])
