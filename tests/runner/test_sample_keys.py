"""Compressed keys learn from a sample before the first request, whatever the pages are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.config import EngineConfig
from octavo.formats import kv_formats
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.spec import group_layers
from octavo.layers.attention import Attention
from octavo.models.family import weight_shapes
from octavo.models.registry import read_spec
from octavo.runner.build import build_runner
from octavo.runner.model_runner import ModelRunner
from octavo.weights.dummy import DummySource
from tests.models.parity import HAS_GPU, ops_or_skip
from tests.models.tiny import save_tiny


def changes(
    folder: Path, case: str, num_ids: int, *, backend: str = "native", num_chunks: int = 200
) -> list[tuple[Tensor, Tensor]]:
    """Returns what each layer takes off its keys and divides them by."""
    ops_or_skip(backend)
    device = "cuda" if backend == "triton" and HAS_GPU else "cpu"
    config = EngineConfig(
        model="tiny", device=device, attention_backend=backend, num_threads=1, max_num_seqs=2
    ).resolve()
    spec, family = read_spec(save_tiny(case, folder).config)
    plan = MemoryPlan(
        available_bytes=0,
        usable_bytes=0,
        weights_bytes=0,
        activation_bytes=0,
        groups=group_layers(spec.kv_specs(kv_formats("int8"))),
        block_size=16,
        num_chunks=num_chunks,
        max_model_len=200,
        max_num_batched_tokens=256,
        max_position_embeddings=spec.max_position_embeddings,
        max_num_seqs=2,
    )
    source = DummySource(weight_shapes(spec, family), "float32", 0)
    ids = [index * 7919 % 211 for index in range(num_ids)]
    runner, _ = build_runner(
        config, spec, family, source, lambda step_bytes: plan, sample=lambda: ids
    )
    assert isinstance(runner, ModelRunner)
    runner.close()
    mixers = [layer.mixer for layer in runner.decoder.layers]
    assert all(isinstance(mixer, Attention) for mixer in mixers)
    found = [mixer.op.key_change for mixer in mixers if isinstance(mixer, Attention)]
    return [
        (one.shift_KD.cpu(), one.factor_KD.cpu())
        for one in found
        if one is not None and one.factor_KD is not None
    ]


@pytest.mark.parametrize("case", ["qwen3-moe", "gemma3"])
def test_every_layer_learns(tmp_path: Path, case: str) -> None:
    found = changes(tmp_path, case, 180)
    assert all(shift.any() and (factor != 1).any() for shift, factor in found)
    for one, other in zip(found, changes(tmp_path, case, 180, backend="reference"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_keys_of_gpus_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("build", "sample_keys"):
        monkeypatch.setattr(f"octavo.runner.{module}.LEAST_TOKENS", 32)
    found = changes(tmp_path, "qwen3", 40, backend="triton")
    assert all(shift.any() and (factor != 1).any() for shift, factor in found)
    for one, other in zip(found, changes(tmp_path, "qwen3", 40), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("num_ids", "num_chunks"), [(100, 200), (180, 7), (0, 200)])
def test_too_few_tokens_or_pages_teach_nothing(
    tmp_path: Path, num_ids: int, num_chunks: int
) -> None:
    found = changes(tmp_path, "qwen3-moe", num_ids, num_chunks=num_chunks)
    assert not any(shift.any() or (factor != 1).any() for shift, factor in found)
