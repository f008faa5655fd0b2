"""Engines of tiny models, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from octavo import LLM, RequestOutput
from tests.models.tiny import TinyModel

HAS_GPU = torch.cuda.is_available()


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and HAS_GPU else "cpu"


@contextmanager
def engine(model: TinyModel, backend: str, **options: Any) -> Iterator[LLM]:
    defaults = {
        "device": device_of(backend),
        "attention_backend": backend,
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "poison_freed_blocks": True,
        "num_threads": 1,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 4 * 2**20,
    }
    llm = LLM(str(model.folder), **{**defaults, **options})
    try:
        yield llm
        llm._core.check()
        assert llm.stats().num_used_blocks == 0
    finally:
        llm.close()


def scores(output: RequestOutput) -> list[list[tuple[int, float]]]:
    """Token and log-probability of every reported candidate, to compare bit by bit."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return [
        [(entry.token_id, entry.logprob) for entry in position.values()] for position in logprobs
    ]


def flat_scores(output: RequestOutput) -> list[float]:
    return [number for position in scores(output) for entry in position for number in entry]


def reference_greedy(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            logits = model.reference(ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()
