"""Routers of the families in transformers, and the rule that says the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from octavo.kernels.routing import RoutingRule
from octavo.kernels.weights import Router

HIDDEN = 32
NUM_EXPERTS = 12
GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
FORCED: dict[str, Any] = {"score": "sigmoid", "renormalize": True, "sum_epsilon": 1e-20}


@dataclass(frozen=True, kw_only=True)
class RouterCase:
    """One family's router module, and what our rule of it is."""

    config: dict[str, Any]
    module: str
    rule: RoutingRule
    call: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]] = lambda module, x: module(x)
    """Returns logits, weights and ids."""
    correction: str | None = None
    """Where the module keeps it; else it is an argument of `call`."""
    scale: str | None = None


def _llama4(module: nn.Module, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scores_TE, logits_TE = module(x_TM)
    weights, ids = scores_TE.topk(2, -1)
    return logits_TE, weights, ids


def _granite(module: nn.Module, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = module(x_TM)  # In an order that differs between versions of transformers.
    (ids,) = (one for one in found if not one.is_floating_point())
    (logits,) = (one for one in found if one.shape[-1] == NUM_EXPERTS)
    (weights,) = (one for one in found if one is not ids and one is not logits)
    return logits, weights, ids


def _gemma4(module: nn.Module, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probabilities, weights, ids = module(x_TM)
    return probabilities.log(), weights, ids


def _with_bias(module: nn.Module, x_TM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return module(x_TM, module.get_buffer("given"))


CASES: dict[str, RouterCase] = {
    "mixtral": RouterCase(
        config={"model_type": "mixtral", "num_local_experts": NUM_EXPERTS},
        module="MixtralTopKRouter",
        rule=RoutingRule(top_k=3, renormalize=True),
    ),
    "qwen3_moe": RouterCase(
        config={"model_type": "qwen3_moe", "num_experts": NUM_EXPERTS, "norm_topk_prob": False},
        module="Qwen3MoeTopKRouter",
        rule=RoutingRule(top_k=3, renormalize=False),
    ),
    "gpt_oss": RouterCase(
        config={"model_type": "gpt_oss", "num_local_experts": NUM_EXPERTS},
        module="GptOssTopKRouter",
        rule=RoutingRule(top_k=3, score="logit", weighting="softmax", renormalize=False),
    ),
    "granitemoe": RouterCase(
        config={"model_type": "granitemoe", "num_local_experts": NUM_EXPERTS},
        module="GraniteMoeTopKRouter",
        rule=RoutingRule(top_k=3, score="logit", weighting="softmax", renormalize=False),
        call=_granite,
    ),
    "llama4": RouterCase(
        config={"model_type": "llama4_text", "num_local_experts": NUM_EXPERTS},
        module="Llama4Router",
        rule=RoutingRule(
            top_k=2, score="logit", weighting="sigmoid", renormalize=False, scales_input=True
        ),
        call=_llama4,
    ),
    "deepseek_v2": RouterCase(
        config={
            "model_type": "deepseek_v2",
            "n_routed_experts": NUM_EXPERTS,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.5,
        },
        module="DeepseekV2TopkRouter",
        rule=RoutingRule(top_k=3, renormalize=False, scale=1.5, float32_logits=True),
    ),
    "deepseek_v2 groups": RouterCase(
        config={
            "model_type": "deepseek_v2",
            "n_routed_experts": NUM_EXPERTS,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            **GROUPS,
        },
        module="DeepseekV2TopkRouter",
        rule=RoutingRule(
            top_k=3,
            num_groups=4,
            top_groups=2,
            renormalize=False,
            scale=16.0,
            float32_logits=True,
        ),
    ),
    "deepseek_v3": RouterCase(
        config={"model_type": "deepseek_v3", "n_routed_experts": NUM_EXPERTS, **GROUPS},
        module="DeepseekV3TopkRouter",
        rule=RoutingRule(
            **FORCED, top_k=3, num_groups=4, top_groups=2, group_score="best_two", scale=2.5
        ),
        correction="e_score_correction_bias",
    ),
    "glm4_moe": RouterCase(
        config={"model_type": "glm4_moe", "n_routed_experts": NUM_EXPERTS, "n_group": 1},
        module="Glm4MoeTopkRouter",
        rule=RoutingRule(**FORCED, top_k=3),
        correction="e_score_correction_bias",
    ),
    "glm4_moe_lite": RouterCase(
        config={
            "model_type": "glm4_moe_lite",
            "n_routed_experts": NUM_EXPERTS,
            "routed_scaling_factor": 1.8,
        },
        module="Glm4MoeLiteTopkRouter",
        rule=RoutingRule(**FORCED, top_k=3, scale=1.8),
        correction="e_score_correction_bias",
    ),
    "minimax_m2": RouterCase(
        config={"model_type": "minimax_m2", "num_local_experts": NUM_EXPERTS},
        module="MiniMaxM2TopKRouter",
        rule=RoutingRule(top_k=3, score="sigmoid", renormalize=True),
        call=_with_bias,
        correction="given",
    ),
    "lfm2_moe": RouterCase(
        config={"model_type": "lfm2_moe", "num_experts": NUM_EXPERTS, "norm_topk_prob": True},
        module="Lfm2MoeTopKRouter",
        rule=RoutingRule(top_k=3, score="sigmoid", renormalize=True, sum_epsilon=1e-6),
        call=_with_bias,
        correction="given",
    ),
    "ernie4_5_moe": RouterCase(
        config={
            "model_type": "ernie4_5_moe",
            "moe_num_experts": NUM_EXPERTS,
            "moe_k": 3,
            "moe_norm_min": 0.3,
        },
        module="Ernie4_5_MoeTopKRouter",
        rule=RoutingRule(top_k=3, renormalize=True, least_sum=0.3, float32_logits=True),
        correction="moe_statics.e_score_correction_bias",
    ),
    "deepseek_v4": RouterCase(
        config={
            "model_type": "deepseek_v4",
            "n_routed_experts": NUM_EXPERTS,
            "routed_scaling_factor": 1.5,
        },
        module="DeepseekV4TopKRouter",
        rule=RoutingRule(
            top_k=3, score="sqrt_softplus", renormalize=True, sum_epsilon=1e-20, scale=1.5
        ),
        correction="e_score_correction_bias",
    ),
    "gemma4": RouterCase(
        config={"model_type": "gemma4_text", "num_experts": NUM_EXPERTS, "top_k_experts": 3},
        module="Gemma4TextRouter",
        rule=RoutingRule(top_k=3, renormalize=True),
        call=_gemma4,
        scale="per_expert_scale",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a family's module does with random rows, and our router for its logits."""

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    router: Router


def run_module(name: str, num_tokens: int) -> Routing:
    """Returns the routes of random rows through a random module."""
    case = CASES[name]
    torch.manual_seed(len(name))
    config = CONFIG_MAPPING[case.config["model_type"]](
        **{"num_experts_per_tok": case.rule.top_k, **case.config, "hidden_size": HIDDEN}
    )
    folder = type(config).__module__.split(".")[-2]
    code = import_module(f"transformers.models.{folder}.modeling_{folder}")
    module = vars(code)[case.module](config)
    if case.correction == "given":
        module.register_buffer("given", torch.zeros(NUM_EXPERTS))
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor.data, std=0.5)
    with torch.no_grad():
        logits, weights, ids = case.call(module, torch.randn(num_tokens, HIDDEN))
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    correction, scale = (
        None if field is None else tensors[field].detach().flatten()
        for field in (case.correction, case.scale)
    )
    router = Router(weights=(), rule=case.rule, correction_E=correction, scale_E=scale)
    return Routing(logits_TE=logits, weights_TK=weights, ids_TK=ids, router=router)


def dense(weights_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """Returns the weights [T, E], 0 where an expert was not chosen: no order, no slots."""
    out = torch.zeros(len(ids_TK), num_experts)
    return out.scatter_(1, ids_TK.long().cpu(), weights_TK.cpu())


RULES: dict[str, RoutingRule] = {
    "sigmoid": RoutingRule(top_k=4, score="sigmoid", renormalize=True, scale=2.5),
    "root": RoutingRule(top_k=1, score="sqrt_softplus", renormalize=False),
    "logit": RoutingRule(top_k=5, score="logit", renormalize=True, least_sum=1.0),
    "late softmax": RoutingRule(top_k=4, score="logit", weighting="softmax", renormalize=False),
    "one late sigmoid": RoutingRule(top_k=1, score="logit", weighting="sigmoid", renormalize=False),
    "groups of three": RoutingRule(
        top_k=2, num_groups=7, top_groups=1, group_score="best_two", renormalize=True
    ),
    "seven of three groups": RoutingRule(
        top_k=7, num_groups=3, top_groups=3, group_score="best_two", renormalize=True
    ),
    "best group": RoutingRule(top_k=3, num_groups=7, top_groups=2, renormalize=False),
    "all": RoutingRule(top_k=21, score="sigmoid", renormalize=True, sum_epsilon=0.5),
}
"""Rules for 21 experts that no family combines so."""


def exact_routes(logits_TE: Tensor, router: Router) -> Tensor:
    """Returns the weights [T, E] that `RoutingRule` describes, in float64 and one by one."""
    rule, rows = router.rule, logits_TE.double().cpu()
    out = torch.zeros_like(rows)
    for t, logits in enumerate(rows):
        scores = {
            "softmax": logits.softmax(0),
            "sigmoid": logits.sigmoid(),
            "sqrt_softplus": (1 + logits.exp()).log().sqrt(),
            "logit": logits,
        }[rule.score]
        correction = router.correction_E
        choice = scores if correction is None else scores + correction.double().cpu()
        size = len(choice) // rule.num_groups
        count = 2 if rule.group_score == "best_two" else 1
        groups = [sorted(part.tolist())[-count:] for part in choice.split(size)]
        order = sorted(range(rule.num_groups), key=lambda g: -sum(groups[g]))[: rule.top_groups]
        eligible = [e for e in range(len(choice)) if e // size in order]
        ids = sorted(eligible, key=lambda e: -float(choice[e]))[: rule.top_k]
        weights = scores[ids]
        if rule.weighting != "score":
            chosen = logits[ids]
            weights = chosen.softmax(0) if rule.weighting == "softmax" else chosen.sigmoid()
        if rule.renormalize:
            weights = weights / max(float(weights.sum()) + rule.sum_epsilon, rule.least_sum)
        scale = 1.0 if router.scale_E is None else router.scale_E.double().cpu()[ids]
        out[t, ids] = weights * rule.scale * scale
    return out
