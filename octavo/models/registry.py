"""Which architectures Octavo knows: Hugging Face architecture name -> family, imported on demand.

Called by everything that starts from a config. It never loads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.family import Family
from octavo.models.hf_config import HFConfig
from octavo.models.pooling_spec import CLASSIFIER, read_pooling
from octavo.models.pruned import read_pruned
from octavo.models.spec import ModelSpec

FAMILIES: dict[str, tuple[str, str]] = {
    "LlamaForCausalLM": ("llama", "LLAMA"),
    "MistralForCausalLM": ("llama", "MISTRAL"),
    "Qwen2ForCausalLM": ("qwen", "QWEN2"),
    "Qwen3ForCausalLM": ("qwen", "QWEN3"),
    "MixtralForCausalLM": ("mixtral", "MIXTRAL"),
    "Qwen2MoeForCausalLM": ("qwen", "QWEN2_MOE"),
    "Qwen3MoeForCausalLM": ("qwen", "QWEN3_MOE"),
    "OlmoeForCausalLM": ("olmoe", "OLMOE"),
    "Gemma2ForCausalLM": ("gemma", "GEMMA2"),
    "Gemma3ForCausalLM": ("gemma", "GEMMA3"),
    "Gemma3ForConditionalGeneration": ("gemma", "GEMMA3_CONDITIONAL"),
    "DeepseekV2ForCausalLM": ("deepseek", "DEEPSEEK_V2"),
    "DeepseekV3ForCausalLM": ("deepseek", "DEEPSEEK_V3"),
    "Glm4MoeLiteForCausalLM": ("deepseek", "GLM4_MOE_LITE"),
    "Glm4MoeForCausalLM": ("glm4_moe", "GLM4_MOE"),
    "GptOssForCausalLM": ("gpt_oss", "GPT_OSS"),
    "Llama4ForCausalLM": ("llama4", "LLAMA4"),
    "Llama4ForConditionalGeneration": ("llama4", "LLAMA4_CONDITIONAL"),
}
"""Architecture -> (module in octavo.models, name of the Family in it)."""
_CAUSAL = "ForCausalLM"
_OTHER_NAMES = {f"Gemma3Text{end}": f"Gemma3{_CAUSAL}" for end in ("Model", CLASSIFIER)}


def find_family(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json. Raises UnsupportedModelError listing the known ones."""
    names = config.get("architectures")
    if not isinstance(names, (list, tuple)) or not names or not isinstance(names[0], str):
        names = ["nothing"]
    place = FAMILIES.get(_generator(names[0]))
    if place is None:
        raise UnsupportedModelError(
            f"config.json: architectures names {names[0]}, which is not known; "
            f"known: {', '.join(FAMILIES)}; and with Model or {CLASSIFIER} in place of {_CAUSAL}"
        )
    module, name = place
    family = import_module(f"octavo.models.{module}").__dict__[name]
    assert isinstance(family, Family)
    return family


def _generator(name: str) -> str:
    """Returns the architecture that differs from `name` in its head alone, and generates."""
    for end in (CLASSIFIER, "Model"):
        if name.endswith(end):
            return _OTHER_NAMES.get(name, name.removesuffix(end) + _CAUSAL)
    return name


def read_spec(
    config: Mapping[str, Any], modules: Sequence[Mapping[str, Any]] = ()
) -> tuple[ModelSpec, Family]:
    """Returns spec and family of a parsed config.json, and of the modules behind the model
    (`weights.modules`). Raises UnsupportedModelError."""
    family = find_family(config)
    spec = family.read(HFConfig(config, config_class=family.config_class))
    spec = read_pruned(config, spec)
    pooling = read_pooling(config, modules)
    wrong = [one for one in pooling.label_tokens if one >= spec.vocab_size] if pooling else []
    if wrong:
        raise UnsupportedModelError(
            f"token {wrong[0]} is to tell the score, but the vocabulary has {spec.vocab_size} "
            f"tokens: 0..{spec.vocab_size - 1}"
        )
    return (spec if pooling is None else replace(spec, pooling=pooling)), family
