"""On a GPU whose memory is taken away while the engine runs: nothing is lost but time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from octavo import LLM, RequestOutput, SamplingParams
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="it fills a GPU")
MIB, VOCAB = 2**20, 211


def test_steps_that_find_no_memory_are_split_or_computed_again(tmp_path: Path) -> None:
    model = save_tiny("qwen3-moe", tmp_path)
    llm = LLM(
        str(model.folder),
        device="cuda",
        dtype="float32",
        skip_tokenizer_init=True,
        kv_cache_memory_bytes=64 * MIB,
        max_num_batched_tokens=4096,
        enforce_eager=True,
        deterministic=True,
        prefix_caching="off",
    )
    draw = random.Random(0)
    longest = llm.plan.max_model_len - 8
    prompts = [[draw.randrange(VOCAB) for _ in range(longest)] for _ in range(64)]
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)

    def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in outputs]

    try:
        expected = tokens(llm.generate(prompts, params, use_tqdm=False))
        torch.cuda.empty_cache()
        allow(torch.cuda.memory_reserved() + 6 * MIB)
        found = tokens(llm.generate(prompts, params, use_tqdm=False))
        stats = llm.stats()
        assert stats.num_splits + stats.num_lost_steps > 0
        assert found == expected
        llm.core.check()
    finally:
        allow(torch.cuda.get_device_properties(0).total_memory)
        llm.close()


def allow(num_bytes: int) -> None:
    """Lets torch have so many bytes of the device."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
