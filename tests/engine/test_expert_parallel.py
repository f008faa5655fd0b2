"""Two ranks that have whole experts, on the CPU: their tokens are one rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, ConfigError
from octavo.models.mlp_spec import MoESpec
from octavo.models.registry import read_spec
from tests.engine.prompts import greedy, prompts_of, tokens
from tests.models import tiny

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "device": "cpu",
    "attention_backend": "reference",
    "num_threads": 1,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
    "kv_cache_memory_bytes": 2**20,
}


def save(
    case: str, changes: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tiny.TinyModel:
    monkeypatch.setitem(tiny.CASES, case, {**tiny.CASES[case], **changes})
    return tiny.save_tiny(case, folder)


def told(model: Path, **options: Any) -> tuple[list[list[int]], tuple[tuple[int, ...], ...]]:
    """Returns the greedy tokens of some prompts, and how many tokens went to each expert."""
    llm = LLM(str(model), **OPTIONS, **options)
    try:
        found = llm.generate(prompts_of((40, 41, 3), seed=2), greedy(12), use_tqdm=False)
        return tokens(found), llm.stats().expert_counts
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        # A shared expert, which ranks share by its units; biases of experts; scaled inputs.
        ("qwen2-moe", {"num_experts": 6}),
        ("gpt-oss", {"num_local_experts": 4}),
        pytest.param("qwen3-moe", {"num_experts": 4}, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", {}, marks=pytest.mark.slow),
        pytest.param("llama4", {}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_with_whole_experts_draw_the_tokens_of_one(
    case: str, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    folder = save(case, changes, tmp_path, monkeypatch).folder
    one = told(folder)
    assert told(folder, tensor_parallel_size=2, enable_expert_parallel=True) == one


@pytest.mark.slow
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_four_ranks_with_whole_experts_draw_the_tokens_of_one(
    num_kv_heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    heads = {"num_attention_heads": 4, "num_key_value_heads": num_kv_heads}
    changes = {"num_experts": 8, "vocab_size": 212, **heads}
    folder = save("qwen3-moe", changes, tmp_path, monkeypatch).folder
    one = told(folder)
    assert told(folder, tensor_parallel_size=4, enable_expert_parallel=True) == one


def test_a_rank_holds_its_experts_whole_and_its_part_of_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, _ = read_spec(save("qwen2-moe", {"num_experts": 6}, tmp_path, monkeypatch).config)
    shared = spec.with_whole_experts().of_rank(2)
    (layer, *_) = spec.moe_layers
    whole, part = spec.layers[layer].mlp, shared.layers[layer].mlp
    assert isinstance(whole, MoESpec)
    assert isinstance(part, MoESpec)
    assert part.num_held == 3
    assert part.expert_size == whole.expert_size
    assert part.shared_size == whole.shared_size // 2
    experts = [expert for _, expert, _ in part.parameters(8) if expert >= 0]
    assert set(experts) == {0, 1, 2}
    assert spec.of_rank(2).num_parameters == shared.num_parameters


def test_experts_that_do_not_divide_are_refused_with_sizes_that_would(tmp_path: Path) -> None:
    config = tiny.save_tiny("mixtral", tmp_path).config
    spec, _ = read_spec(config)
    layer = spec.with_whole_experts().layers[0].mlp
    wanted = "tensor_parallel_size 3 cannot share 4 experts evenly; use 1 or 2 or 4"
    with pytest.raises(ConfigError, match=wanted):
        layer.of_rank(3)


def test_a_dense_model_has_no_experts_to_share(tmp_path: Path) -> None:
    spec, _ = read_spec(tiny.save_tiny("llama", tmp_path).config)
    with pytest.raises(ConfigError, match="this model has none"):
        spec.with_whole_experts()
