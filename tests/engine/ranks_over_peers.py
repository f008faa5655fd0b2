"""A rank that computes a model in Triton's interpreter, in step with another; run by
test_peer_sums.py.

`python -m tests.engine.ranks_over_peers ADDRESS FOLDER MODEL LAYOUT` is rank 1, whose memory and
that of rank 0 are files in FOLDER. LAYOUT: "parts" of experts or "whole" ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.load import load_runner
from octavo.grammar import Guides, Vocabulary
from octavo.parallel import Collectives, Meeting
from octavo.request import Request, SamplingParams, pack_ids
from octavo.weights.hub import resolve_model
from tests.engine.prompts import prompts_of
from tests.kernels.triton.peers import two_ranks
from tests.kernels.triton.peers.two_ranks import SIZE, MappedRanks

from octavo.kernels.triton.peers import sums  # isort: skip

MAX_TOKENS = 2


def tokens_of(model: Path, collectives: Collectives, layout: str) -> dict[str, list[int]]:
    """Returns greedy tokens of two prompts side by side, then of one alone."""
    two_ranks.NUM_BYTES = 1 << 16
    sums.UNGATED_ROWS = two_ranks.UNGATED_ROWS
    config = EngineConfig(
        model=str(model),
        skip_tokenizer_init=True,
        device="cpu",
        dtype="float32",
        attention_backend="triton",
        num_threads=1,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        max_model_len=32,
        kv_cache_memory_bytes=1 << 20,
        tensor_parallel_size=collectives.size,
        enable_expert_parallel=collectives.size > 1 and layout == "whole",
        step_stretch=0.0,
    ).resolve()
    runner, plan = load_runner(config, resolve_model(str(model)), collectives)
    assert collectives.size == 1 or isinstance(runner.decoder.collectives, sums.PeerSums)  # type: ignore[attr-defined]
    core = EngineCore(config, plan, runner, "model", Guides(_no_vocabulary, 1))
    found: dict[str, list[int]] = {}
    try:
        for prompts in (prompts_of((6, 3), seed=2), prompts_of((1,), seed=4)):
            for prompt in prompts:
                name = str(len(found))
                found[name] = []
                params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
                core.add(Request(request_id=name, packed_prompt=pack_ids(prompt), params=params))
            while core.has_work:
                for delta in core.step():
                    found[delta.request_id].extend(delta.token_ids)
    finally:
        core.close()
    return found


def _no_vocabulary() -> Vocabulary:
    raise AssertionError("nobody asks for a grammar")


def main(address: str, folder: str, model: str, layout: str) -> None:
    torch.set_num_threads(1)
    ranks = MappedRanks(Meeting.at(address, SIZE), 1, Path(folder))
    tokens_of(Path(model), ranks, layout)


if __name__ == "__main__":
    main(*sys.argv[1:])
