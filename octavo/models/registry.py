"""Which architectures Octavo knows: Hugging Face architecture name -> family, imported on demand.

Called by everything that starts from a config. It never loads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from octavo.errors import UnsupportedModelError
from octavo.models.family import Family
from octavo.models.hf_config import HFConfig
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
    "GptOssForCausalLM": ("gpt_oss", "GPT_OSS"),
    "Llama4ForCausalLM": ("llama4", "LLAMA4"),
    "Llama4ForConditionalGeneration": ("llama4", "LLAMA4_CONDITIONAL"),
}
"""Architecture -> (module in octavo.models, name of the Family in it)."""


def find_family(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json. Raises UnsupportedModelError listing the known ones."""
    names = config.get("architectures")
    if not isinstance(names, (list, tuple)) or not names or not isinstance(names[0], str):
        names = ["nothing"]
    place = FAMILIES.get(names[0])
    if place is None:
        raise UnsupportedModelError(
            f"config.json: architectures names {names[0]}, which is not known; "
            f"known: {', '.join(FAMILIES)}"
        )
    module, name = place
    family = import_module(f"octavo.models.{module}").__dict__[name]
    assert isinstance(family, Family)
    return family


def read_spec(config: Mapping[str, Any]) -> tuple[ModelSpec, Family]:
    """Returns spec and family of a parsed config.json. Raises UnsupportedModelError."""
    family = find_family(config)
    return family.read(HFConfig(config, config_class=family.config_class)), family
