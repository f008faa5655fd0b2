"""RoPE tables equal transformers' for the settings that published models use."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.layers.rope import build_rope_table, inverse_frequencies
from octavo.models.registry import read_spec

SETTINGS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "Llama 3.1": (
        131_072,
        500_000.0,
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Qwen3 yarn": (
        131_072,
        1_000_000.0,
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
    ),
    "yarn with its own attention factor": (
        65_536,
        10_000.0,
        {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 0.9,
        },
    ),
    "Llama 4 Scout": (
        10_485_760,
        500_000.0,
        {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "yarn of fractions": (
        131_072,
        150_000.0,
        {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ),
    "proportional": (
        131_072,
        1_000_000.0,
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    ),
    "linear": (8192, 10_000.0, {"rope_type": "linear", "factor": 2.5}),
    "dynamic": (4096, 10_000.0, {"rope_type": "dynamic", "factor": 2.0}),
}


def make_config(name: str) -> LlamaConfig:
    length, theta, rope = SETTINGS[name]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=256,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=length,
        rope_parameters={**rope, "rope_theta": theta},
    )


@pytest.mark.parametrize("stretch", [1, 3])
@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_equal_transformers(name: str, stretch: int) -> None:
    config = make_config(name)
    length = stretch * config.max_position_embeddings
    function = ROPE_INIT_FUNCTIONS[SETTINGS[name][2]["rope_type"]]
    expected, attention_factor = function(config, seq_len=length)
    spec = read_spec(config.to_dict())[0].ropes[0]
    assert spec.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    torch.testing.assert_close(inverse_frequencies(spec, length), expected, rtol=1e-6, atol=0)


def test_the_table_holds_scaled_cos_and_sin_of_every_position() -> None:
    spec = read_spec(make_config("Qwen3 yarn").to_dict())[0].ropes[0]
    table = build_rope_table(spec, 500, torch.device("cpu"))
    frequencies = inverse_frequencies(spec, 500)
    assert table.cos.shape == table.sin.shape == (500, 64)
    for position in (0, 1, 499):
        expected = (position * frequencies).cos() * spec.attention_factor
        torch.testing.assert_close(table.cos[position], expected)
    norm = table.cos.square() + table.sin.square()
    torch.testing.assert_close(norm, torch.full_like(norm, spec.attention_factor**2))


def test_a_dynamic_rope_within_the_trained_length_is_the_plain_one() -> None:
    spec = read_spec(make_config("dynamic").to_dict())[0].ropes[0]
    within, at_limit = inverse_frequencies(spec, 100), inverse_frequencies(spec, 4096)
    assert torch.equal(within, at_limit)
    assert (inverse_frequencies(spec, 8192)[1:] < within[1:]).all()
