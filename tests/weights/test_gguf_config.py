"""Configs made of GGUF metadata say what config.json says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.models.registry import read_spec
from octavo.weights.gguf_config import config_of, generation_config_of
from octavo.weights.gguf_file import read_gguf
from tests.models.tiny import save_tiny
from tests.weights.tiny_gguf import write_tiny_gguf, write_values

KEYS = (
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "tie_word_embeddings",
)
MOE_KEYS = (
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@pytest.mark.parametrize(
    "case",
    ["llama", "llama-tied-biased", "qwen2", "qwen3", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe"],
)
def test_the_config_says_what_the_checkpoint_of_the_family_says(case: str, tmp_path: Path):
    tiny = save_tiny(case, tmp_path)
    path = tmp_path / "model.gguf"
    write_tiny_gguf(path, tiny)
    config = config_of(read_gguf(path))
    for key in KEYS:
        assert config[key] == tiny.config[key], key
    for key in MOE_KEYS:
        assert config.get(key) == tiny.config.get(key), key
    num_experts = {config.get(key) for key in ("num_experts", "num_local_experts")}
    assert num_experts == {tiny.config.get(key) for key in ("num_experts", "num_local_experts")}
    assert config["rms_norm_eps"] == pytest.approx(tiny.config["rms_norm_eps"])
    assert config["rope_theta"] == tiny.config["rope_parameters"]["rope_theta"]
    heads = tiny.config["hidden_size"] // tiny.config["num_attention_heads"]
    assert config["head_dim"] == (tiny.config.get("head_dim") or heads)
    if "moe_intermediate_size" not in tiny.config:
        assert config["intermediate_size"] == tiny.config["intermediate_size"]
    assert bool(tiny.config.get("attention_bias")) <= config["attention_bias"]


def test_dense_layers_of_a_moe_model_are_found(tmp_path: Path):
    tiny = save_tiny("qwen2-moe", tmp_path)
    write_tiny_gguf(tmp_path / "model.gguf", tiny)
    config = config_of(read_gguf(tmp_path / "model.gguf"))
    assert config["mlp_only_layers"] == [0, 2, 3]
    assert config["decoder_sparse_step"] == 1


@pytest.mark.parametrize(
    ("case", "expected"), [("qwen2-moe", False), ("qwen3-moe", True), ("olmoe", False)]
)
def test_expert_weights_are_normalised_as_llama_cpp_does(case: str, expected: bool, tmp_path: Path):
    write_tiny_gguf(tmp_path / "model.gguf", save_tiny(case, tmp_path))
    assert config_of(read_gguf(tmp_path / "model.gguf"))["norm_topk_prob"] is expected


def test_a_sliding_window_makes_a_llama_file_a_mistral(tmp_path: Path):
    path = write_values(tmp_path / "m.gguf", "llama", {"attention.sliding_window": 32}, {})
    config = config_of(read_gguf(path))
    assert (config["model_type"], config["sliding_window"]) == ("mistral", 32)


def test_the_end_of_text_and_the_end_of_turn_both_end_a_text(tmp_path: Path):
    ids = {f"tokenizer.ggml.{kind}_token_id": n for kind, n in (("bos", 1), ("eos", 2), ("eot", 5))}
    config = config_of(read_gguf(write_values(tmp_path / "m.gguf", "llama", ids, {})))
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, [2, 5])


@pytest.mark.parametrize(
    ("tokens", "ids", "ends"),
    [
        (["a", "b", "c"], {"eos": 2}, 2),
        (["a", "b", "c"], {"eos": 2, "eot": 1, "eom": 0}, [2, 1, 0]),
        (["<|im_end|>", "b", "</s>"], {"eos": 2}, [2, 0]),
        (["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"], {"eos": 1}, [1, 0, 2]),
        (["<end_of_turn>", "<eos>", "c"], {"eos": 1}, [1, 0]),
        (["<|im_end|>", "b", "c"], {}, 0),
        (["<|end|>", "<|return|>", "<|call|>"], {"eos": 1}, [1, 2]),
        (["a", "b", "c"], {"eos": 7}, None),
    ],
)
def test_a_turn_ends_with_the_tokens_of_the_keys_and_with_those_known_by_their_text(
    tokens: list[str], ids: dict[str, int], ends: object, tmp_path: Path
):
    keys = {f"tokenizer.ggml.{kind}_token_id": number for kind, number in ids.items()}
    values = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, **keys}
    file = read_gguf(write_values(tmp_path / "m.gguf", "llama", values, {}))
    assert generation_config_of(file).get("eos_token_id") == ends


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_only_a_sentencepiece_vocabulary_has_ids_without_keys(model: str, tmp_path: Path):
    values = {"tokenizer.ggml.model": model, "tokenizer.ggml.tokens": ["a", "b", "c"]}
    file = read_gguf(write_values(tmp_path / "m.gguf", "llama", values, {}))
    wanted = {"bos_token_id": 1, "eos_token_id": 2} if model == "llama" else {}
    assert generation_config_of(file) == wanted


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_a_factor_without_a_type_is_linear_as_for_llama_cpp(
    values: dict[str, Any], scaling: object, tmp_path: Path
):
    path = write_values(tmp_path / "m.gguf", "qwen2", values, {})
    assert config_of(read_gguf(path))["rope_scaling"] == scaling


def test_a_window_of_zero_is_none_and_not_the_default_of_mistral(tmp_path: Path):
    path = write_values(tmp_path / "m.gguf", "llama", {"attention.sliding_window": 0}, {})
    config = config_of(read_gguf(path))
    assert [layer.attention.visibility.most_visible for layer in read_spec(config)[0].layers] == [
        None
    ]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_the_factors_that_the_file_keeps(
    factor: float, tmp_path: Path
):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    rope = {**scaling, "rope_theta": 500_000.0}
    hf = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, torch.device("cpu"))
    plain = 1 / 500_000.0 ** (torch.arange(0, 128, 2) / 128)
    values = {"rope.freq_base": 500_000.0, "attention.key_length": 128}
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    path = write_values(tmp_path / "m.gguf", "llama", values, factors)
    assert config_of(read_gguf(path))["rope_scaling"] == scaling
    factors["rope_freqs.weight"][20] *= 1.1
    path = write_values(tmp_path / "m.gguf", "llama", values, factors)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight holds .* at 20"):
        config_of(read_gguf(path))


def test_linear_and_yarn_scaling_are_read(tmp_path: Path):
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = write_values(tmp_path / "m.gguf", "llama", linear, {})
    assert config_of(read_gguf(path))["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = {**linear, "rope.scaling.type": "yarn", "rope.scaling.original_context_length": 32}
    path = write_values(tmp_path / "m.gguf", "qwen2", yarn, {})
    assert config_of(read_gguf(path))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope.scaling.type": "longrope"}, r"longrope'; known is none, linear, yarn"),
        ({"attention.head_count": [4]}, r"head_count is \[4\]; known is one number"),
        ({"logit_scale": 0.5}, r"logit_scale is 0\.5; known is 0\.0 or 1\.0"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0; known is 0\.0"),
        ({"attention.clamp_kqv": 8.0}, r"attention\.clamp_kqv is 8\.0; known is 0\.0"),
        ({"expert_group_count": 4}, "expert_group_count is 4; known is 0 or 1"),
        ({"nextn_predict_layers": 1}, "nextn_predict_layers is 1; known is 0"),
        ({"attention.head_count": 0}, "head_count is 0; known is a number of at least 1"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, r"ext_factor is 0.5"),
        ({"expert_count": 2, "expert_weights_scale": 2.5}, r"expert_weights_scale is 2.5"),
        ({"feed_forward_length": None}, r"llama\.feed_forward_length is missing"),
        ({"attention.value_length": 8}, r"value_length is 8; known is the head size, 16"),
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"block_count": 10**9}, "block_count is 1000000000; known is at most 10000"),
        ({"expert_count": 2, "expert_gating_func": 2}, r"gating_func is 2; known is 1 \(softmax\)"),
    ],
)
def test_what_cannot_be_expressed_is_refused(values: dict[str, Any], message: str, tmp_path: Path):
    path = write_values(tmp_path / "m.gguf", "llama", values, {})
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(read_gguf(path))


@pytest.mark.parametrize("layout", ["stacked", "fused", "split"])
@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe"])
def test_the_size_of_experts_is_read_from_every_layout(case: str, layout: str, tmp_path: Path):
    tiny = save_tiny(case, tmp_path)
    write_tiny_gguf(tmp_path / "model.gguf", tiny, layout=layout)
    config = config_of(read_gguf(tmp_path / "model.gguf"))
    field = "moe_intermediate_size" if case == "qwen3-moe" else "intermediate_size"
    assert config[field] == tiny.config[field]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"blk\.0\.ffn_gate\.0\.weight is missing"),
        (
            {"blk.0.ffn_gate_exps.weight": np.zeros(64, np.float32)},
            r"ffn_gate_exps\.weight has the shape \[64\], expected 3 dimensions",
        ),
        (
            {"token_embd.weight": np.zeros(64, np.float32)},
            r"token_embd\.weight has the shape \[64\], expected 2 dimensions",
        ),
    ],
)
def test_tensors_that_sizes_are_read_from_must_be_there(
    tensors: dict[str, np.ndarray], message: str, tmp_path: Path
):
    router = {"blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32)}
    experts = {"expert_count": 2, "expert_used_count": 1}
    path = write_values(tmp_path / "m.gguf", "qwen3moe", experts, router | tensors)
    with pytest.raises(WeightsError, match=message):
        config_of(read_gguf(path))


def test_values_that_change_nothing_are_let_pass(tmp_path: Path):
    neutral = {"logit_scale": 1.0, "residual_scale": 0.0, "nextn_predict_layers": 0}
    path = write_values(tmp_path / "m.gguf", "llama", neutral, {})
    assert config_of(read_gguf(path))["model_type"] == "llama"


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("llama", {"expert_weights_norm": 0}, "expert_weights_norm is 0; known is true"),
        ("llama", {"feed_forward_length": 48}, "is 48; known is 32, the rows of the experts"),
        ("qwen3moe", {"expert_feed_forward_length": 48}, "is 48; known is 32, the rows of the ex"),
        (
            "qwen2moe",
            {"expert_shared_feed_forward_length": 32},
            r"is 32; known is 16, the rows of blk\.0\.ffn_gate_shexp\.weight",
        ),
    ],
)
def test_what_experts_contradict_is_refused(
    architecture: str, values: dict[str, Any], message: str, tmp_path: Path
):
    tensors = {
        "blk.0.ffn_gate_inp.weight": np.zeros((2, 64), np.float32),
        "blk.0.ffn_gate_exps.weight": np.zeros((2, 32, 64), np.float32),
        "blk.0.ffn_gate_shexp.weight": np.zeros((16, 64), np.float32),
    }
    experts = {"expert_count": 2, "expert_used_count": 1}
    path = write_values(tmp_path / "m.gguf", architecture, experts | values, tensors)
    with pytest.raises(UnsupportedModelError, match=message):
        config_of(read_gguf(path))


def test_factors_of_frequencies_in_another_type_are_refused(tmp_path: Path):
    factors = {"rope_freqs.weight": np.ones(8, np.float16)}
    path = write_values(tmp_path / "m.gguf", "llama", {}, factors)
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs\.weight is in f16; known is f32"):
        config_of(read_gguf(path))


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path):
    path = write_values(tmp_path / "m.gguf", "mamba", {}, {})
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is unknown; known are llama, qwen2"):
        config_of(read_gguf(path))
