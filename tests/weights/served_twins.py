"""A file served by Octavo beside the model in `transformers` that it was written from."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from tests.models.tiny import TinyModel


def assert_says_what_transformers_says(
    path: Path, model: TinyModel, prompt: list[int], tolerance: float, **options: Any
) -> None:
    """Eight greedy tokens are equal, and their log-probabilities within `tolerance`."""
    llm = LLM(str(path), skip_tokenizer_init=True, num_threads=1, **options)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0)
    with contextlib.closing(llm):
        (output,) = llm.generate([prompt], params, use_tqdm=False)
    said = output.outputs[0]
    tokens = list(said.token_ids)
    with torch.inference_mode():
        logits = model.reference(torch.tensor([prompt + tokens])).logits[0]
    expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    assert tokens == expected.argmax(dim=-1).tolist()
    assert said.logprobs is not None
    found = [entry[token].logprob for entry, token in zip(said.logprobs, tokens, strict=True)]
    assert found == pytest.approx(expected.max(dim=-1).values.tolist(), abs=tolerance)
