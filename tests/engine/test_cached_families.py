"""A cached prefix says what computing it says, whatever a family's layers keep and see."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from octavo import LLM, RequestOutput
from tests.engine.prompts import greedy, prompts_of, tokens
from tests.models.tiny import save_tiny

FAMILIES = (
    *("gemma2", "gemma3", "gemma3-capped", "gpt-oss", "gpt-oss-odd"),
    *("deepseek-v2", "deepseek-v3", "glm4-moe-lite", "glm4-moe"),
    *("llama4", "llama4-two-experts"),
)


def answers(folder: Path, prefix_caching: str, prompts: list[list[int]]) -> list[RequestOutput]:
    """Returns the outputs of prompts that are asked one after the other."""
    llm = LLM(
        str(folder),
        device="cpu",
        skip_tokenizer_init=True,
        poison_freed_blocks=True,
        num_threads=1,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=2**22,
        prefix_caching=prefix_caching,
    )
    with contextlib.closing(llm):
        return [llm.generate([one], greedy(8, logprobs=2), use_tqdm=False)[0] for one in prompts]


@pytest.mark.parametrize("case", FAMILIES)
def test_prompts_that_are_cached_in_part_are_answered_as_if_they_were_not(
    case: str, tmp_path: Path
) -> None:
    tiny = save_tiny(case, tmp_path)
    long, other = prompts_of([150, 60], seed=3)
    prompts = [long, long, long[:100] + other, long + other, long[:40]]
    cold = answers(tiny.folder, "off", prompts)
    warm = answers(tiny.folder, "on", prompts)
    assert tokens(warm) == tokens(cold)
    for one, two in zip(warm, cold, strict=True):
        assert one.outputs[0].logprobs == two.outputs[0].logprobs
    cached = [output.num_cached_tokens for output in warm]
    assert cached == [0, 144, 96, 144, 32]
