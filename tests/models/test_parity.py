"""Every family gives transformers' logits: whole, in chunks, in batches, decoded, run ahead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.kernels.ops import Ops
from octavo.models.decoder import Decoder
from tests.models.parity import (
    BACKENDS,
    DEVICE_TOLERANCE,
    HAS_GPU,
    MAX_MODEL_LEN,
    TOLERANCE,
    assert_parity,
    drive,
    load,
    load_or_skip,
    ops_or_skip,
    prompts,
)
from tests.models.tiny import CASES, TinyModel, save_tiny
from tests.runner.driver import Tracked


@pytest.fixture(scope="module", params=(*BACKENDS, *["triton"] * HAS_GPU))
def ops(request: pytest.FixtureRequest) -> Ops:
    return ops_or_skip(request.param)


@pytest.fixture(scope="module", params=CASES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def decoder(tiny: TinyModel, ops: Ops) -> Decoder:
    return load_or_skip(tiny, ops, MAX_MODEL_LEN)


def check(tiny: TinyModel, decoder: Decoder, sequence: Tracked) -> None:
    is_device = decoder.ops.name == "triton"
    assert_parity(tiny, sequence, DEVICE_TOLERANCE if is_device else TOLERANCE)


def test_a_whole_prompt_and_its_decode_equal_transformers(
    tiny: TinyModel, decoder: Decoder
) -> None:
    with drive(decoder) as driver:
        sequence = driver.add(prompts(decoder.spec.vocab_size)[0])
        driver.step([(sequence, sequence.prompt_len)])
        driver.decode([sequence], 6)
    check(tiny, decoder, sequence)


def test_a_prompt_in_chunks_of_odd_sizes_equals_transformers(
    tiny: TinyModel, decoder: Decoder
) -> None:
    with drive(decoder, seed=1) as driver:
        sequence = driver.add(prompts(decoder.spec.vocab_size)[0])
        for count in (1, 7, 19, 2, 17, 15):
            driver.step([(sequence, count)])
        driver.decode([sequence], 3)
    check(tiny, decoder, sequence)


def test_a_batch_of_prefills_and_decodes_of_mixed_lengths_equals_transformers(
    tiny: TinyModel, decoder: Decoder
) -> None:
    with drive(decoder, seed=2) as driver:
        long, one, middle, block = (driver.add(p) for p in prompts(decoder.spec.vocab_size))
        driver.step([(one, 1), (long, 9), (block, 16)])
        driver.step([(long, 30), (one, 1), (middle, 32), (block, 1)])
        driver.step([(block, 1), (middle, 1), (one, 1), (long, 22)])
        driver.free(block)
        late = driver.add(prompts(decoder.spec.vocab_size, (23,))[0])
        driver.step([(one, 1), (late, 23), (middle, 1), (long, 1)])
        driver.decode([long, late, one, middle], 3)
    for sequence in (long, one, middle, block, late):
        check(tiny, decoder, sequence)


def test_preempted_and_forked_sequences_equal_transformers(
    tiny: TinyModel, decoder: Decoder
) -> None:
    with drive(decoder, seed=4) as driver:
        parent, victim = (driver.add(p) for p in prompts(decoder.spec.vocab_size, (61, 35)))
        driver.step([(parent, 61), (victim, 35)])
        driver.decode([parent, victim], 4)
        driver.free(victim)  # its blocks are poisoned: what comes back is computed again
        child = driver.fork(parent)
        driver.decode([parent, child], 2)
        again = driver.add(victim.tokens)
        driver.step([(child, 1), (again, 20), (parent, 1)])
        driver.step([(again, len(victim.tokens) - 20), (child, 1), (parent, 1)])
        driver.decode([again, child, parent], 2)
    for sequence in (parent, child, again):
        check(tiny, decoder, sequence)


def test_decode_that_runs_ahead_of_the_host_equals_transformers(
    tiny: TinyModel, decoder: Decoder
) -> None:
    with drive(decoder, seed=3) as driver:
        first, second, *_ = (driver.add(p) for p in prompts(decoder.spec.vocab_size, (20, 37)))
        launched = driver.launch([(first, 20), (second, 37)])
        for _ in range(5):
            ahead = driver.launch([(second, 1), (first, 1)])
            driver.collect(launched)
            launched = ahead
        driver.collect(launched)
    check(tiny, decoder, first)
    check(tiny, decoder, second)


def test_a_dynamic_rope_stretched_to_the_context_equals_transformers(
    ops: Ops, tmp_path: Path
) -> None:
    tiny = save_tiny("llama-dynamic", tmp_path)
    length = 300  # transformers stretches to the text: equal where the text fills the context
    decoder = load(tiny, ops, length)
    with drive(decoder, max_model_len=length) as driver:
        sequence = driver.add(prompts(decoder.spec.vocab_size, (length,))[0])
        driver.step([(sequence, length)])
    check(tiny, decoder, sequence)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("mistral-window", {}),  # absent: 4,096
        ("mistral-window", {"sliding_window": None}),
        ("qwen2-window", {"sliding_window": None, "layer_types": None}),
        ("qwen3-moe-sparse", {"sliding_window": None}),
        ("qwen3-moe-sparse", {"use_sliding_window": True}),
    ],
)
def test_a_window_that_is_null_or_absent_equals_transformers_beyond_its_default(
    case: str, change: dict[str, Any], tmp_path: Path
) -> None:
    tiny = reread(save_tiny(case, tmp_path), "sliding_window", change)
    length = 4_150
    decoder = load(tiny, ops_or_skip("native"), length)
    with drive(decoder, max_model_len=length, num_blocks=600) as driver:
        sequence = driver.add(prompts(decoder.spec.vocab_size, (length,))[0])
        driver.step([(sequence, length)])
    check(tiny, decoder, sequence)


def reread(tiny: TinyModel, removed: str, change: dict[str, Any]) -> TinyModel:
    """The same weights under a config.json without a field, or with another value."""
    kept = {key: value for key, value in tiny.config.items() if key != removed}
    config = {**kept, **change, "max_position_embeddings": 8192}
    (tiny.folder / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(tiny.folder, dtype=torch.float32).eval()
    return TinyModel(reference=reference, folder=tiny.folder, config=config)


@pytest.mark.skipif(HAS_GPU, reason="all families run on the GPU")
@pytest.mark.parametrize("case", ["qwen3-mixed", "qwen2-moe-window", "gemma2", "gpt-oss", "llama4"])
def test_a_few_tokens_through_the_interpreter_equal_transformers(case: str, tmp_path: Path) -> None:
    tiny = save_tiny(case, tmp_path)
    decoder = load_or_skip(tiny, ops_or_skip("triton"), 64)
    with drive(decoder, max_model_len=64, max_num_seqs=3, num_blocks=16) as driver:
        long, short = (driver.add(p) for p in prompts(decoder.spec.vocab_size, (26, 3)))
        driver.step([(long, 22)])
        driver.step([(long, 4), (short, 3)])
        driver.step([(short, 1), (long, 1)])
    check(tiny, decoder, long)
    check(tiny, decoder, short)
