"""What a family file declares: how to read its config, and what its weights are called.

Made by the family files, kept by `registry`, used by the loaders. It never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from octavo.models.config_classes import ConfigClass
from octavo.models.hf_config import HFConfig
from octavo.models.parameter import Parameter, Shape
from octavo.models.spec import ModelSpec
from octavo.weights.names import expert_names

_LAYER = "model.layers.{layer}"

DENSE_NAMES: dict[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "score": "score.weight",
    "attention_norm": f"{_LAYER}.input_layernorm.weight",
    **{
        f"{part}{suffix}": f"{_LAYER}.self_attn.{part}_proj.{kind}"
        for part in ("q", "k", "v", "o")
        for suffix, kind in (("", "weight"), ("_bias", "bias"))
    },
    "q_norm": f"{_LAYER}.self_attn.q_norm.weight",
    "k_norm": f"{_LAYER}.self_attn.k_norm.weight",
    "mlp_norm": f"{_LAYER}.post_attention_layernorm.weight",
    **{part: f"{_LAYER}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
"""Names that all families of Llama's lineage share."""


VISION_NAMES = tuple(
    f"{prefix}{part}.*"
    for prefix in ("", "model.")
    for part in ("vision_tower", "vision_model", "multi_modal_projector")
)
"""What checkpoints of models that see have beside the text model."""


def moe_names(model_type: str) -> dict[str, str]:
    """Returns DENSE_NAMES, and what `weights.names` says of the experts."""
    names = expert_names(model_type)
    experts = {
        f"expert_{part}{suffix}": names.expert("{layer}", "{expert}", part, kind=kind)
        for part in names.parts
        for suffix, kind in (("", "weight"), ("_bias", "bias"))
    }
    router = {
        "router": names.router("{layer}"),
        "router_bias": f"{_LAYER}.{names.block}.{names.router_name}.bias",
        "router_correction": names.correction("{layer}"),
    }
    return {**DENSE_NAMES, **router, **experts}


def shared_names(block: str) -> dict[str, str]:
    """Returns the names of a shared expert that lies at `block`, below a layer."""
    return {
        f"shared_{part}": f"{_LAYER}.{block}.{part}_proj.weight" for part in ("gate", "up", "down")
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face architecture."""

    config_class: ConfigClass
    """What its config.json may leave out or have null."""
    read: Callable[[HFConfig], ModelSpec]
    """Makes the spec from a config; raises UnsupportedModelError on what it does not know."""
    names: Mapping[str, str]
    """Canonical parameter name -> name in the checkpoint, with {layer} and {expert}."""
    ignorable: tuple[str, ...] = ()
    """Shell patterns of what checkpoints have beside the model that is served; {num_layers} stands
    for the number of its layers."""

    def weight_name(self, parameter: Parameter) -> str:
        """Returns the parameter's name in a Hugging Face checkpoint."""
        template = self.names[parameter.name]
        return template.format(layer=parameter.layer, expert=parameter.expert)


def weight_shapes(spec: ModelSpec, family: Family) -> dict[str, Shape]:
    """Returns checkpoint name -> shape of every tensor the model needs, and of no other."""
    return {family.weight_name(parameter): shape for parameter, shape in spec.parameters()}


def ignorable_names(spec: ModelSpec, family: Family) -> tuple[str, ...]:
    """Returns names that a checkpoint may have although the model does not need them."""
    is_beside = spec.tie_embeddings or not spec.has_lm_head
    head = (family.weight_name(Parameter("lm_head")),) if is_beside else ()
    beside = (pattern.format(num_layers=len(spec.layers)) for pattern in family.ignorable)
    return (*beside, *head)
