"""DeepSeek V2, V3, R1, V3.1, Kimi K2, GLM-4.7-Flash: latent attention, shared and routed experts.

Read by the registry. Data only: it never touches a tensor. Layers that predict tokens further ahead
come with some checkpoints and are not loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from octavo.kernels.routing import RoutingRule
from octavo.models import config_classes
from octavo.models.attention_spec import LatentAttentionSpec
from octavo.models.family import Family, moe_names, shared_names
from octavo.models.hf_config import HFConfig
from octavo.models.hf_layers import read_decoder, read_mlp, read_moe
from octavo.models.hf_rope import read_rope
from octavo.models.mlp_spec import MoESpec
from octavo.models.spec import LayerSpec, ModelSpec

_ATTENTION = "model.layers.{layer}.self_attn"
NAMES = {
    **moe_names("deepseek_v3"),
    **shared_names("mlp.shared_experts"),
    "q_a": f"{_ATTENTION}.q_a_proj.weight",
    "q_a_bias": f"{_ATTENTION}.q_a_proj.bias",
    "q_a_norm": f"{_ATTENTION}.q_a_layernorm.weight",
    "q_b": f"{_ATTENTION}.q_b_proj.weight",
    "kv_a": f"{_ATTENTION}.kv_a_proj_with_mqa.weight",
    "kv_a_bias": f"{_ATTENTION}.kv_a_proj_with_mqa.bias",
    "kv_a_norm": f"{_ATTENTION}.kv_a_layernorm.weight",
    "kv_b": f"{_ATTENTION}.kv_b_proj.weight",
}
PREDICTORS = ("model.layers.{num_layers}.*",)
"""Names of the layers that predict tokens further ahead."""
_LATENT_NORM_EPS = 1e-6
"""Of both latent vectors, whatever rms_norm_eps says."""
_SUM_EPSILON = 1e-20


def read_deepseek_v2(config: HFConfig) -> ModelSpec:
    config.must_be_off("mlp_bias")
    config.must_be_off("norm_topk_prob")
    _must_be(config, "scoring_func", "softmax")
    moe = _read_experts(config)
    rule = RoutingRule(
        top_k=moe.top_k,
        renormalize=False,
        scale=config.number("routed_scaling_factor"),
        float32_logits=True,
    )
    method = config.text("topk_method")
    if method == "group_limited_greedy":
        rule = _with_groups(config, moe, rule)
    elif method != "greedy":
        config.refuse("topk_method", "greedy, group_limited_greedy")
    first = config.integer("first_k_dense_replace", least=0)
    attention = _read_latent(config, pairs_neighbours=True)
    return _read(config, attention, replace(moe, rule=rule), lambda index: index >= first)


def read_deepseek_v3(config: HFConfig) -> ModelSpec:
    _must_be(config, "scoring_func", "sigmoid")
    _must_be(config, "topk_method", "noaux_tc")
    first = config.integer("first_k_dense_replace", least=0)
    return _read_sigmoid(config, lambda index: index >= first)


def read_glm4_moe_lite(config: HFConfig) -> ModelSpec:
    types = config.value("mlp_layer_types")
    if types is None:
        _must_be(config, "first_k_dense_replace", 1)
        return _read_sigmoid(config, lambda index: index > 0)
    num_layers = config.count("num_hidden_layers")
    is_known = isinstance(types, list) and all(kind in ("dense", "sparse") for kind in types)
    if not is_known or len(types) != num_layers:
        config.refuse("mlp_layer_types", f"{num_layers} times dense or sparse")
    return _read_sigmoid(config, lambda index: types[index] == "sparse")


def _read_sigmoid(config: HFConfig, is_sparse: Callable[[int], bool]) -> ModelSpec:
    attention = _read_latent(config, pairs_neighbours=bool(config.value("rope_interleave")))
    return _read(config, attention, read_sigmoid_moe(config), is_sparse)


def read_sigmoid_moe(config: HFConfig) -> MoESpec:
    """Returns experts that DeepSeek-V3's rule chooses: groups first, by sigmoids and a correction
    that the weights do not see."""
    moe = _read_experts(config)
    rule = RoutingRule(
        top_k=moe.top_k,
        score="sigmoid",
        group_score="best_two",
        renormalize=bool(config.value("norm_topk_prob")),
        sum_epsilon=_SUM_EPSILON,
        scale=config.number("routed_scaling_factor"),
        float32_logits=True,
    )
    return replace(moe, rule=_with_groups(config, moe, rule), has_correction=True)


def _read(
    config: HFConfig,
    attention: LatentAttentionSpec,
    moe: MoESpec,
    is_sparse: Callable[[int], bool],
) -> ModelSpec:
    dense = read_mlp(config)
    return read_decoder(
        config,
        lambda index: LayerSpec(attention=attention, mlp=moe if is_sparse(index) else dense),
    )


def _read_latent(config: HFConfig, *, pairs_neighbours: bool) -> LatentAttentionSpec:
    num_heads = config.integer("num_attention_heads")
    if (config.optional_integer("num_key_value_heads") or num_heads) != num_heads:
        config.refuse("num_key_value_heads", f"num_attention_heads ({num_heads})")
    nope_size, rope_size = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    if rope_size % 2:
        config.refuse("qk_rope_head_dim", "an even number")
    rope = replace(read_rope(config, rope_size), pairs_neighbours=pairs_neighbours)
    return LatentAttentionSpec(
        num_heads=num_heads,
        kv_rank=config.integer("kv_lora_rank"),
        nope_size=nope_size,
        rope_size=rope_size,
        value_size=config.integer("v_head_dim"),
        q_rank=config.optional_integer("q_lora_rank"),
        scale=(nope_size + rope_size) ** -0.5 * rope.score_factor,
        rope=rope,
        norm_eps=_LATENT_NORM_EPS,
        bias=config.boolean("attention_bias"),
    )


def _read_experts(config: HFConfig) -> MoESpec:
    _must_be(config, "moe_layer_freq", 1)
    moe = read_moe(
        config,
        size_field="moe_intermediate_size",
        count_field="n_routed_experts",
        renormalize=False,
    )
    return replace(moe, shared_size=moe.expert_size * config.integer("n_shared_experts"))


def _with_groups(config: HFConfig, moe: MoESpec, rule: RoutingRule) -> RoutingRule:
    count, best = config.integer("n_group"), config.integer("topk_group")
    size = moe.num_experts // count
    if moe.num_experts % count or (rule.group_score == "best_two" and size < 2):
        config.refuse("n_group", f"a divisor of n_routed_experts ({moe.num_experts})")
    if best > count or best * size < moe.top_k:
        config.refuse(
            "topk_group", f"at most n_group ({count}), with num_experts_per_tok in their experts"
        )
    return replace(rule, num_groups=count, top_groups=best)


def _must_be(config: HFConfig, name: str, known: str | int) -> None:
    """Refuses another value of a field that transformers ignores, and that says how to compute."""
    if config.value(name) not in (None, known):
        config.refuse(name, str(known))


DEEPSEEK_V2 = Family(config_class=config_classes.DEEPSEEK_V2, read=read_deepseek_v2, names=NAMES)
DEEPSEEK_V3 = Family(
    config_class=config_classes.DEEPSEEK_V3,
    read=read_deepseek_v3,
    names=NAMES,
    ignorable=PREDICTORS,
)
GLM4_MOE_LITE = Family(
    config_class=config_classes.GLM4_MOE_LITE,
    read=read_glm4_moe_lite,
    names=NAMES,
    ignorable=PREDICTORS,
)
