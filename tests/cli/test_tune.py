"""`octavo tune` from a config to a file that the engine reads; what is fastest is made up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.kernels.triton.interpreter import DEVICE

from octavo.cli import main, tune  # isort: skip
from octavo.cli.commands import build_parser  # isort: skip
from octavo.cli.bench.shapes import MODELS
from octavo.kernels.registry import Needs, select_ops
from octavo.kernels.triton.tuning.shapes import KINDS, read_shapes, shapes_path
from octavo.models.registry import read_spec

TINY_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": 1,
}


@pytest.fixture
def tiny_moe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    warps = {"num_warps": (2, 8)}  # the interpreter is slow
    few = {"block_n": (16, 64), **warps}
    for name, value in (("MAX_SETS", 2), ("LIMITS", few), ("ROWS_LIMITS", warps)):
        monkeypatch.setattr(f"octavo.kernels.triton.tuning.tune.{name}", value)
    for name, tokens in (("DECODES", (4,)), ("PREFILLS", ()), ("REST", ())):
        monkeypatch.setattr(tune, name, tokens)
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_MOE))
    return str(folder)


def drawn(seed: int) -> Callable[[Callable[[], object]], float]:
    """Returns a measure that draws lots instead of running anything."""
    lots = random.Random(seed)
    return lambda run: lots.uniform(1.0, 2.0)


def run(argv: list[str], seed: int = 3) -> int:
    args = build_parser().parse_checked(["tune", *argv, "--device", DEVICE, "--dtype", "float16"])
    return tune.run(args, drawn(seed))


@pytest.mark.parametrize("mode", [[], ["--deterministic"]])
def test_what_is_kept_is_what_the_engine_asks(
    tiny_moe: str, tmp_path: Path, mode: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([tiny_moe, "--seconds", "300", *mode]) == 0
    out = capsys.readouterr().out
    folder, device = tmp_path / "cache" / "tuned", torch.device(DEVICE)
    tuned = read_shapes(shapes_path(folder, device)).tuned
    assert tuned
    assert f"{len(tuned)} of " in out
    assert str(folder) in out
    assert "moe float16 4 2 8 32 64" in {line[:44].strip() for line in out.splitlines()}
    needs = Needs(device=device, tuned_folder=folder, is_deterministic=bool(mode))
    ops = select_ops("triton", needs)
    assert ops._shapes.tuned == tuned
    for key, shape in tuned.items():
        assert type(shape) is KINDS[str(key[0])]


def test_a_rank_of_two_multiplies_half() -> None:
    spec, _ = read_spec(MODELS["qwen3-30b-a3b"].config)
    whole, half = (set(tune.problems_of(s, False)) for s in (spec, spec.of_rank(2)))
    assert tune.Problem("moe", 1, (8, 128, 768, 2048)) in whole
    assert tune.Problem("moe", 1, (8, 128, 384, 2048)) in half
    assert tune.Problem("dense", 4, (5120, 2048)) in whole
    assert tune.Problem("dense", 4, (2560, 2048)) in half
    assert tune.Problem("dense", 4, (75968, 2048)) in half


def test_time_that_is_up_leaves_the_rest_for_the_next_run(
    tiny_moe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([tiny_moe, "--seconds", "0"]) == 0
    assert "0 of 0 shapes" in (out := capsys.readouterr().out)
    assert "were not reached in 0 s" in out


def test_a_cpu_has_no_launch_shapes(tiny_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", tiny_model, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "launch shapes exist only for GPUs" in error
    assert error.count("\n") == 1
