"""A runner built from options and a memory plan keeps to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.formats import kv_formats
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.spec import group_layers
from octavo.models.family import weight_shapes
from octavo.models.registry import read_spec
from octavo.runner.build import build_runner
from octavo.runner.model_runner import ModelRunner
from octavo.step import Purpose, RowStart, StepPlan
from octavo.weights.dummy import DummySource
from tests.models.tiny import save_tiny
from tests.runner.deltas import row_delta
from tests.runner.driver import GREEDY


def build(folder: Path, backend: str, dtype: str = "float32") -> ModelRunner:
    config = EngineConfig(
        model="tiny", device="cpu", attention_backend=backend, num_threads=1, max_num_seqs=2
    ).resolve()
    spec, family = read_spec(save_tiny("qwen3-moe", folder).config)
    groups = group_layers(spec.kv_specs(kv_formats("bfloat16")))
    plan = MemoryPlan(
        available_bytes=0,
        usable_bytes=0,
        weights_bytes=0,
        activation_bytes=0,
        groups=groups,
        block_size=16,
        num_chunks=7,
        max_model_len=48,
        max_num_batched_tokens=64,
        max_position_embeddings=spec.max_position_embeddings,
        max_num_seqs=2,
    )
    source = DummySource(weight_shapes(spec, family), dtype, 0)
    runner, kept = build_runner(config, spec, family, source, lambda step_bytes: plan)
    assert kept is plan
    assert isinstance(runner, ModelRunner)
    return runner


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_runner_is_built_from_a_plan_and_runs_a_step(tmp_path: Path, dtype: str) -> None:
    runner = build(tmp_path, "reference", dtype)
    assert runner.storage.num_chunks == 7
    assert runner.storage.layer(0).key.dtype == torch.bfloat16
    assert torch.get_num_threads() == 1
    tokens = np.arange(9, dtype=np.int32)
    plan = StepPlan(
        step_id=3,
        rows=np.array([1], np.int32),
        starts=np.array([0], np.int32),
        query_lens=np.array([9], np.int32),
        token_ids=tokens,
        from_device=np.array([False]),
        purposes=np.array([Purpose.TOKEN], np.int8),
        row_starts=(
            RowStart(
                row=1, params=GREEDY, seed=0, stop_token_ids=(), prompt_len=9, token_ids=tokens
            ),
        ),
        table_deltas=(row_delta(0, 1, 0, np.array([5], np.int32)),),
    )
    result = runner.collect(runner.launch(plan))
    runner.close()
    assert result.step_id == 3
    assert 0 <= result.token_ids[0] < 211


def test_an_unknown_back_end_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="attention_backend 'cuda' is unknown"):
        build(tmp_path, "cuda")
