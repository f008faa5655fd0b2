"""Prompts of random ids for the tiny models, greedy sampling, and the tokens that come back."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from octavo import RequestOutput, SamplingParams

VOCAB = 211


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]
