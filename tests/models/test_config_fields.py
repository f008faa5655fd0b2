"""Every field that a family reads, absent, null and with other values: what transformers makes of
it is what the spec says, and what transformers cannot use is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.activations import ACT2FN

from octavo.errors import UnsupportedModelError
from octavo.kernels.activations import ClampedSwiGLU
from octavo.layers.rope import inverse_frequencies
from octavo.layers.rope_spec import QueryTemperature
from octavo.models.attention_spec import AttentionSpec, LatentAttentionSpec
from octavo.models.family import weight_shapes
from octavo.models.hf_config import HFConfig
from octavo.models.registry import FAMILIES, find_family, read_spec
from octavo.models.spec import MLPSpec, ModelSpec, MoESpec
from octavo.weights.names import expert_names
from tests.models.config_bases import (
    ARCHITECTURES,
    FIXED,
    GROUPED_KINDS,
    LATENT_KINDS,
    LLAMA3,
    OTHERS,
    TIED_SIZES,
    UNLIKE,
    WIDE,
    WINDOWED,
    YARN,
    base,
)


def fields_read(model_type: str) -> list[str]:
    """The fields that the family asks for, with windows, biases and all."""

    class Recorder(dict[str, Any]):
        asked: set[str]

        def __contains__(self, key: object) -> bool:
            self.asked.add(str(key))
            return super().__contains__(key)

    config = Recorder({**base(model_type), "use_sliding_window": True, "mlp_only_layers": [1]})
    config.asked = set()
    family = find_family(config)
    family.read(HFConfig(config, config_class=family.config_class))
    return sorted(config.asked)


FIELDS = [(kind, name) for kind in ARCHITECTURES for name in fields_read(kind)]


def reference_of(config: Mapping[str, Any], *, runs: bool) -> PreTrainedModel | Exception:
    """The model that transformers makes of a config.json, or why it makes none. `runs`: it must
    also compute something; else its tensors have shapes alone, for sizes that are large."""
    try:
        made = CONFIG_MAPPING[config["model_type"]].from_dict(deepcopy(dict(config)))
        with torch.device("cpu" if runs else "meta"):
            model = AutoModelForCausalLM.from_config(made)
        if runs:
            model(torch.tensor([list(range(9))]))
    except Exception as error:
        return error
    return model


def shapes_of(model: PreTrainedModel, model_type: str) -> dict[str, tuple[int, ...]]:
    """Shapes by checkpoint name, stacked experts one by one."""
    names, shapes = expert_names(model_type), {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        stack = name.rpartition(".experts.")[2].removesuffix("_bias")
        if stack in ("gate_up_proj", "down_proj"):
            kind = "bias" if name.endswith("_bias") else "weight"
            one = shape[1:] if names.layout == "rows" else shape[:0:-1]
            parts = ("down",) if stack == "down_proj" else ("gate", "up")
            for expert in range(shape[0]):
                for part in parts:
                    full = names.expert(layer, expert, part, kind=kind)
                    shapes[full] = (one[0] // len(parts), *one[1:])
        elif name.endswith("mlp.gate.weight"):
            shapes[names.router(layer)] = shape
        else:
            shapes[name] = shape
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def windows_of(model: PreTrainedModel) -> list[int | None]:
    """Each layer's window as the forward pass of its class applies it."""
    config = model.config
    if config.model_type == "llama4_text":
        return [
            config.attention_chunk_size if kind == "chunked_attention" else None
            for kind in config.layer_types
        ]
    if config.model_type in ("qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3_text", "gpt_oss"):
        return [
            config.sliding_window if kind == "sliding_attention" else None
            for kind in config.layer_types
        ]
    has_window = config.model_type in ("mistral", "mixtral", "qwen3_moe")
    return [config.sliding_window if has_window else None] * config.num_hidden_layers


def assert_same(spec: ModelSpec, model: PreTrainedModel, config: Mapping[str, Any]) -> None:
    kind, theirs = config["model_type"], model.config
    assert weight_shapes(spec, find_family(config)) == shapes_of(model, kind)
    assert spec.max_position_embeddings == theirs.max_position_embeddings
    assert spec.norm_eps == theirs.rms_norm_eps
    assert spec.tie_embeddings == theirs.tie_word_embeddings
    assert [layer.attention.visibility.most_visible for layer in spec.layers] == windows_of(model)
    if kind in LATENT_KINDS:
        assert_same_latent(spec, model)
        return
    assert spec.logit_soft_cap == getattr(theirs, "final_logit_softcapping", None)
    scale = getattr(model.model.embed_tokens, "scalar_embed_scale", 1.0)
    assert spec.embedding_scale == pytest.approx(scale)
    rotary = type(model.model.rotary_emb)(theirs)  # on the CPU, wherever the model is
    for index, (layer, module) in enumerate(zip(spec.layers, model.model.layers, strict=True)):
        attention = layer.attention
        assert_same_positions(attention, module.self_attn, rotary, index)
        assert (attention.num_heads, attention.head_size) == (
            theirs.num_attention_heads,
            module.self_attn.head_dim,
        )
        assert attention.scale == pytest.approx(module.self_attn.scaling)
        assert attention.clip_qkv == (theirs.clip_qkv if kind == "olmoe" else None)
        if kind == "gemma2":
            assert attention.soft_cap == module.self_attn.attn_logit_softcapping
        if kind == "gpt_oss":
            theirs_is = module.mlp.experts.alpha, module.mlp.experts.limit
            assert layer.mlp.activation == ClampedSwiGLU(alpha=theirs_is[0], limit=theirs_is[1])
        else:
            name = theirs.hidden_activation if kind.startswith("gemma") else theirs.hidden_act
            assert (layer.mlp.activation == "silu") == (ACT2FN[name](torch.ones(1)) < 0.8)
        if isinstance(layer.mlp, MoESpec):
            assert layer.mlp.top_k == theirs.num_experts_per_tok
            if kind not in ("gpt_oss", "llama4_text"):
                assert layer.mlp.rule.renormalize == (kind == "mixtral" or theirs.norm_topk_prob)
            if kind == "glm4_moe":
                assert layer.mlp.rule.scale == theirs.routed_scaling_factor
                groups = layer.mlp.rule.num_groups, layer.mlp.rule.top_groups
                assert groups == (theirs.n_group, theirs.topk_group)
        else:
            assert isinstance(layer.mlp, MLPSpec)


def assert_same_latent(spec: ModelSpec, model: PreTrainedModel) -> None:
    config: Any = model.config
    rotary = type(model.model.rotary_emb)(config)
    frequencies = inverse_frequencies(spec.ropes[0], config.max_position_embeddings)
    torch.testing.assert_close(frequencies, rotary.inv_freq)
    assert spec.ropes[0].attention_factor == pytest.approx(rotary.attention_scaling)
    is_paired = config.model_type == "deepseek_v2" or bool(config.rope_interleave)
    for layer, module in zip(spec.layers, model.model.layers, strict=True):
        ours, theirs = layer.attention, module.self_attn
        assert isinstance(ours, LatentAttentionSpec)
        assert ours.scale == pytest.approx(theirs.scaling)
        assert ours.rope.pairs_neighbours == is_paired
        sizes = theirs.num_heads, theirs.kv_lora_rank, theirs.qk_nope_head_dim, theirs.v_head_dim
        assert (ours.num_heads, ours.kv_rank, ours.nope_size, ours.value_size) == sizes
        assert isinstance(layer.mlp, MoESpec) == hasattr(module.mlp, "experts")
        if isinstance(layer.mlp, MoESpec):
            rule = layer.mlp.rule
            assert rule.top_k == config.num_experts_per_tok
            assert rule.scale == config.routed_scaling_factor
            is_grouped = getattr(config, "topk_method", "") != "greedy"
            groups = (config.n_group, config.topk_group) if is_grouped else (1, 1)
            assert (rule.num_groups, rule.top_groups) == groups
            is_normed = config.model_type != "deepseek_v2" and bool(config.norm_topk_prob)
            assert rule.renormalize == is_normed


def assert_same_positions(
    ours: AttentionSpec, theirs: nn.Module, rotary: nn.Module, layer: int
) -> None:
    """What positions do to queries and keys of one layer."""
    config: Any = theirs.config
    kind = config.model_type
    prefix = f"{config.layer_types[layer]}_" if kind == "gemma3_text" else ""
    is_llama4 = kind == "llama4_text"
    assert (ours.rope is not None) == (not is_llama4 or bool(config.no_rope_layers[layer]))
    if ours.rope is not None:
        frequencies = inverse_frequencies(ours.rope, config.max_position_embeddings)
        torch.testing.assert_close(frequencies, getattr(rotary, f"{prefix}inv_freq"))
        factor = getattr(rotary, f"{prefix}attention_scaling")
        assert ours.rope.attention_factor == pytest.approx(factor)
        assert ours.rope.pairs_neighbours == is_llama4
    if is_llama4:
        assert (ours.qk_norm == "unweighted") == hasattr(theirs, "qk_norm")
        is_tuned = config.attn_temperature_tuning and not config.no_rope_layers[layer]
        tuned = QueryTemperature(floor=config.floor_scale, scale=config.attn_scale)
        assert ours.temperature == (tuned if is_tuned else None)


def compare(config: Mapping[str, Any], *, runs: bool = True) -> None:
    """Both make the same of a config, or neither makes anything."""
    reference = reference_of(config, runs=runs)
    if isinstance(reference, Exception):
        with pytest.raises(UnsupportedModelError):
            read_spec(config)
        return
    assert_same(read_spec(config)[0], reference, config)


def without(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != name}


def test_every_family_is_compared() -> None:
    alone = {name for name in FAMILIES if not name.endswith("ForConditionalGeneration")}
    assert set(ARCHITECTURES.values()) == alone
    assert {name for _, name in FIELDS} <= set(OTHERS)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_defaults_are_those_of_transformers_config_class(model_type: str) -> None:
    cls = CONFIG_MAPPING[model_type]
    theirs: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    theirs["rope_theta"] = cls.default_theta
    if model_type == "gemma3_text":
        theirs["rope_theta"] = cls.default_theta["global"]
        theirs["rope_local_base_freq"] = cls.default_theta["local"]
        theirs["sliding_window_pattern"] = cls()._sliding_window_pattern
    if model_type == "glm4_moe":
        theirs["partial_rotary_factor"] = cls().rope_parameters["partial_rotary_factor"]
    theirs |= FIXED.get(model_type, {})
    family = find_family(base(model_type))
    for name, value in family.config_class.defaults.items():
        assert theirs.get(name) == value, name
    # A field of theirs that a family reads has its default in our table.
    assert set(fields_read(model_type)) & theirs.keys() <= family.config_class.defaults.keys()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [one for one in FIELDS if one[0] not in GROUPED_KINDS or one[1] not in TIED_SIZES],
)
def test_an_absent_field_means_what_it_means_to_transformers(model_type: str, name: str) -> None:
    wide = {"hidden_size": 128} if model_type in GROUPED_KINDS else WIDE
    compare(without({**base(model_type), **wide}, name), runs=False)
    compare(without({**base(model_type), **wide, "use_sliding_window": True}, name), runs=False)


@pytest.mark.parametrize("name", sorted(TIED_SIZES))
def test_sizes_that_do_not_fit_each_other_are_refused(name: str) -> None:
    config = {**base("deepseek_v3"), "num_attention_heads": 6, "num_key_value_heads": 6}
    assert isinstance(read_spec({**config, "n_group": 1, "topk_group": 1})[0], ModelSpec)
    with pytest.raises(UnsupportedModelError, match="known: "):
        read_spec({**config, name: 5})


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "num_hidden_layers"),
        ("deepseek_v2", "num_hidden_layers"),
        ("qwen3_moe", "num_experts"),
    ],
)
def test_counts_without_end_are_refused(model_type: str, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{name} is 1000000000; known: at most 10000"):
        read_spec({**base(model_type), name: 10**9})


@pytest.mark.parametrize(("model_type", "name"), FIELDS)
def test_a_null_field_means_what_it_means_to_transformers(model_type: str, name: str) -> None:
    compare({**base(model_type), name: None})
    if model_type != "olmoe":  # which has no windows
        compare({**base(model_type), **WINDOWED, name: None})


def is_flat_rope(model_type: str, name: str, value: Any) -> bool:
    """What Gemma 3 in transformers ignores, and we refuse: its layers have two RoPEs."""
    return model_type == "gemma3_text" and name == "rope_parameters" and bool(value)


OTHER_VALUES = [
    pytest.param(model_type, name, value, id=f"{model_type}-{name}-{value}")
    for model_type, name in FIELDS
    for value in OTHERS.get(name, ())
    if (model_type, name) not in UNLIKE and not is_flat_rope(model_type, name, value)
]


@pytest.mark.parametrize(("model_type", "name", "value"), OTHER_VALUES)
def test_another_value_means_what_it_means_to_transformers(
    model_type: str, name: str, value: Any
) -> None:
    compare({**base(model_type), name: value})


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_moe"])
def test_layer_types_rule_over_the_windows_of_the_family(model_type: str) -> None:
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    compare({**base(model_type), **WINDOWED, "layer_types": types})


@pytest.mark.parametrize("both", [(3, 5), (5, 3)])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "olmoe"])
def test_of_two_names_of_a_field_the_same_one_wins_as_in_transformers(
    model_type: str, both: tuple[int, int]
) -> None:
    compare({**base(model_type), "num_experts": both[0], "num_local_experts": both[1]})


PART = {"rope_type": "default", "partial_rotary_factor": 0.75}


@pytest.mark.parametrize(
    "change",
    [
        *({"partial_rotary_factor": value} for value in (0.25, 0.5, 0.76, 1.0, 1.25)),
        *({"rope_parameters": {**PART, "partial_rotary_factor": value}} for value in (0.25, None)),
        {"rope_parameters": PART, "partial_rotary_factor": 0.25},
        {"rope_parameters": PART, "rope_scaling": {**YARN, "partial_rotary_factor": 0.25}},
        {"rope_scaling": YARN, "head_dim": 24},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.25},
        {"rope_scaling": LLAMA3},
    ],
    ids=str,
)
def test_a_part_of_a_head_is_rotated_as_in_transformers(change: dict[str, Any]) -> None:
    compare({**base("glm4_moe"), **change})


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.4, "half"])
def test_a_part_of_a_head_that_is_not_even_is_refused(factor: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="partial_rotary_factor is"):
        read_spec({**base("glm4_moe"), "partial_rotary_factor": factor})


ROPE_CHANGES: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5.0}},
    {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
    {"rope_parameters": {"rope_type": None}},
    {"rope_scaling": {"type": None}},
    {"rope_scaling": {"type": "linear", "rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": None}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 8},
    {"rope_scaling": YARN, "original_max_position_embeddings": None},
    *({"rope_scaling": {**YARN, name: None}} for name in YARN),
    *(
        {"rope_scaling": {**YARN, name: value}}
        for name in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow")
        for value in (None, 0)
    ),
    {"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 1.5}},
    {"rope_scaling": {**YARN, "attention_factor": None}},
    {"rope_scaling": {**YARN, "attention_factor": 1.5}},
    *({"rope_scaling": {**YARN, "truncate": value}} for value in (None, True, False)),
    {"rope_scaling": without(YARN, "original_max_position_embeddings")},
    *({"rope_scaling": {**LLAMA3, name: None}} for name in LLAMA3),
    *({"rope_scaling": without(LLAMA3, name)} for name in LLAMA3 if name != "rope_type"),
    {"rope_scaling": {**LLAMA3, "rope_theta": 99.0}},
]


@pytest.mark.parametrize("change", ROPE_CHANGES, ids=str)
def test_rope_fields_mean_what_they_mean_to_transformers(change: dict[str, Any]) -> None:
    compare({**base("llama"), "head_dim": 16, **change})
