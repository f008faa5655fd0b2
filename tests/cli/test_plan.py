"""`octavo plan` from a config alone."""

from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.cli import main
from octavo.cli.plan import PART_NAMES, spec_parts
from octavo.models.registry import read_spec


def plan(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Of the CPU unless `argv` names a device: the machine may have a GPU."""
    assert main(["plan", "--device", "cpu", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_is_enough(tiny_model: str, capsys: pytest.CaptureFixture[str]):
    made = plan([tiny_model, "--memory", "1GiB"], capsys)
    # 2 layers x (K + V) x 2 heads x 16 numbers x 4 bytes
    assert made["kv_token_bytes"] == 2 * 2 * 2 * 16 * 4
    assert made["weights_bytes"] == 4 * made["num_parameters"]
    assert made["available_bytes"] == 2**30
    assert made["max_model_len"] == 512


def test_the_parts_add_up_to_the_weights(tiny_model: str, capsys: pytest.CaptureFixture[str]):
    made = plan([tiny_model, "--dtype", "float16"], capsys)
    assert sum(made["weights_parts_bytes"].values()) == made["weights_bytes"]
    assert made["weights_bytes"] == 2 * made["num_parameters"]


def test_the_text_names_what_goes_where_and_what_would_change(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", tiny_model, "--device=cpu", "--lengths", "100,400"]) == 0
    text = capsys.readouterr().out
    for words in ("embeddings", "attention", "KV cache", "400 tokens", "--kv-cache-dtype float16"):
        assert words in text


def test_a_smaller_kv_format_halves_what_a_token_costs(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    made = plan([tiny_model], capsys)
    other = made["changes"]["--kv-cache-dtype float16"]
    assert other["kv_token_bytes"] * 2 == made["kv_token_bytes"]


def test_a_model_that_does_not_fit_is_an_error_after_its_sizes(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", tiny_model, "--device=cpu", "--memory", "64KiB"]) == 2
    shown = capsys.readouterr()
    assert "embeddings" in shown.out
    assert "What would fit" in shown.err


def test_experts_are_their_own_part(tiny_config: dict[str, Any]):
    config = tiny_config | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }
    spec, _ = read_spec(config)
    parts = spec_parts(spec, 2)
    assert set(parts) == set(PART_NAMES)
    assert parts["experts"] == 2 * 2 * 4 * 3 * 32 * 64
    assert parts["shared experts"] == 2 * 2 * (3 * 48 * 64 + 64)
    assert sum(parts.values()) == 2 * spec.num_parameters


def test_a_card_that_is_not_here_can_be_planned_for(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    card = plan([tiny_model, "--device", "cuda", "--gpu-memory", "80GiB"], capsys)
    assert card["usable_bytes"] == int(0.9 * 80 * 2**30)
    assert card["max_num_batched_tokens"] == 8192
    assert card["graph_bytes"] > 0
    host = plan([tiny_model, "--device", "cpu", "--memory", "80GiB"], capsys)
    assert host["max_num_batched_tokens"] == 512
    assert host["graph_bytes"] == host["other_bytes"] == 0
