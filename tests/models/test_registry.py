"""Configs become specs: both forms of every field, and a clear no to what is not known."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from octavo.errors import UnsupportedModelError
from octavo.formats import kv_formats
from octavo.kv_cache.spec import group_layers
from octavo.models.family import ignorable_names, weight_shapes
from octavo.models.registry import FAMILIES, read_spec
from octavo.models.spec import ModelSpec
from octavo.visibility import Full, Window
from tests.models.tiny import CASES, save_tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


def old_form(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 wrote it: rope_theta and rope_scaling, no layer_types."""
    old = deepcopy(config)
    rope = old.pop("rope_parameters")
    if config["model_type"] == "gemma3_text":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    # null is YaRN for gpt-oss
    is_plain = rope["type"] == "default" and config["model_type"] != "gpt_oss"
    old["rope_scaling"] = None if is_plain else rope
    return old


@pytest.mark.parametrize("case", CASES)
def test_old_and_new_config_forms_mean_the_same(case: str, tmp_path: Path) -> None:
    new = save_tiny(case, tmp_path).config
    old = old_form(dict(new))
    if "layer_types" not in CASES[case]:  # else they follow no rule
        old.pop("layer_types", None)
    assert read_spec(old) == read_spec(new)


@pytest.mark.parametrize("case", CASES)
def test_weight_shapes_are_those_of_the_model_in_transformers(case: str, tmp_path: Path) -> None:
    tiny = save_tiny(case, tmp_path)
    spec, family = read_spec(tiny.config)
    buffers = dict(tiny.reference.named_buffers())
    corrections = [one for name, one in buffers.items() if name.endswith("correction_bias")]
    expected = tiny.reference.num_parameters() + sum(one.numel() for one in corrections)
    assert spec.num_parameters == expected
    assert len(weight_shapes(spec, family)) == sum(1 for _ in spec.parameters())


def test_every_family_is_tried_by_a_tiny_model() -> None:
    tried = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case["model_type"]] for case in CASES.values()}
    assert tried == {name for name in FAMILIES if not name.endswith("ForConditionalGeneration")}


def test_a_config_is_read_without_importing_torch() -> None:
    program = (
        "import sys\n"
        "from octavo.models.registry import read_spec\n"
        f"spec, family = read_spec({LLAMA!r})\n"
        "from octavo.device import select_device\n"
        "select_device('cpu').memory()\n"
        "print(spec.num_parameters, 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split()[1:] == ["False"], done.stderr


def test_layers_with_and_without_window_form_two_groups() -> None:
    config = {
        **LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 4,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    }
    spec, _ = read_spec(config)
    groups = group_layers(spec.kv_specs(kv_formats("bfloat16")))
    assert [g.layers for g in groups] == [(0, 1), (2, 3)]
    assert [g.spec.visibility for g in groups] == [Full(), Window(8)]
    assert groups[0].spec.token_bytes == 2 * 2 * 8 * 2


def test_a_tied_model_may_have_an_lm_head_that_nobody_needs() -> None:
    spec, family = read_spec({**LLAMA, "tie_word_embeddings": True})
    assert "lm_head.weight" not in weight_shapes(spec, family)
    assert ignorable_names(spec, family) == ("lm_head.weight",)
    assert ignorable_names(*read_spec(LLAMA)) == ()


def test_the_default_rope_theta_is_the_familys_own() -> None:
    mixtral = {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}
    mixtral["architectures"] = ["MixtralForCausalLM"]
    assert read_spec(LLAMA)[0].ropes[0].theta == 10_000
    assert read_spec(mixtral)[0].ropes[0].theta == 1_000_000


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths() -> None:
    rope = {"rope_type": "yarn", "original_max_position_embeddings": 16}
    assert read_spec({**LLAMA, "rope_scaling": rope})[0].ropes[0].factor == 4


def rejected(change: dict[str, Any]) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        read_spec({**LLAMA, **change})
    return str(caught.value)


@pytest.mark.parametrize("given", [["GPT2LMHeadModel"], [], None, "x", [3]])
def test_an_unknown_architecture_is_refused_with_the_known_ones(given: object) -> None:
    message = rejected({"architectures": given})
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, ("hidden_act", "relu", "silu")),
        ({"hidden_size": "32"}, ("hidden_size", "'32'", "integer")),
        ({"hidden_size": None}, ("hidden_size", "missing")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers", "0", "at least 1")),
        ({"num_hidden_layers": True}, ("num_hidden_layers", "True")),
        ({"num_key_value_heads": 3}, ("num_key_value_heads", "3", "divisor")),
        ({"head_dim": 7}, ("head_dim", "7", "even")),
        ({"rms_norm_eps": -1.0}, ("rms_norm_eps", "-1.0")),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps", "nan")),
        ({"tie_word_embeddings": 1}, ("tie_word_embeddings", "1", "true or false")),
        ({"mlp_bias": True}, ("mlp_bias", "True")),
        ({"rope_scaling": {"type": "longrope"}}, ("longrope", "yarn", "llama3")),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling", "factor", "missing")),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, ("x is 1", "factor")),
        ({"rope_scaling": [1]}, ("rope_scaling", "object")),
        ({"rope_parameters": {"full_attention": {}}}, ("full_attention",)),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    ],
)
def test_an_unknown_feature_is_refused_by_field_and_value(
    change: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = rejected(change)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_experts_per_tok": 9}, ("num_experts_per_tok", "9", "at most num_experts (4)")),
        ({"layer_types": ["full_attention"]}, ("layer_types", "2 times")),
        ({"layer_types": ["linear_attention"] * 2}, ("layer_types", "linear_attention")),
        ({"layer_types": ["sliding_attention"] * 2}, ("sliding_window",)),
        ({"mlp_only_layers": ["0"]}, ("mlp_only_layers", "list of integers")),
        ({"shared_expert_intermediate_size": None}, ("shared_expert_intermediate_size",)),
    ],
)
def test_what_makes_no_sense_in_a_moe_config_is_refused(
    change: dict[str, Any], words: tuple[str, ...]
) -> None:
    moe = {
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    assert isinstance(read_spec({**LLAMA, **moe})[0], ModelSpec)
    message = rejected({**moe, **change})
    assert all(word in message for word in words), message
