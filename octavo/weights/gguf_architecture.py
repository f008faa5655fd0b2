"""Which models a GGUF file's `general.architecture` stands for. No torch.

Asked by `gguf_config` and `gguf_source`.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import UnsupportedModelError
from octavo.weights.gguf_file import GGUFFile


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What one `general.architecture` is called by Hugging Face, and what the file leaves out."""

    model_type: str
    class_name: str
    norm_topk_prob: bool = False
    """Whether llama.cpp scales the chosen experts' weights to a sum of 1 for this family."""
    norm_offset: float = 0.0
    """What the file adds to the weights of norms, which the model adds itself."""


ARCHITECTURES = {
    "llama": Architecture(model_type="llama", class_name="LlamaForCausalLM"),
    "qwen2": Architecture(model_type="qwen2", class_name="Qwen2ForCausalLM"),
    "qwen3": Architecture(model_type="qwen3", class_name="Qwen3ForCausalLM"),
    "qwen2moe": Architecture(model_type="qwen2_moe", class_name="Qwen2MoeForCausalLM"),
    "qwen3moe": Architecture(
        model_type="qwen3_moe", class_name="Qwen3MoeForCausalLM", norm_topk_prob=True
    ),
    "olmoe": Architecture(model_type="olmoe", class_name="OlmoeForCausalLM"),
    "gemma3": Architecture(
        model_type="gemma3_text", class_name="Gemma3ForCausalLM", norm_offset=1.0
    ),
    "deepseek2": Architecture(model_type="deepseek_v2", class_name="DeepseekV2ForCausalLM"),
    "gpt-oss": Architecture(model_type="gpt_oss", class_name="GptOssForCausalLM"),
    "glm4moe": Architecture(model_type="glm4_moe", class_name="Glm4MoeForCausalLM"),
}
_MISTRAL = Architecture(model_type="mistral", class_name="MistralForCausalLM")
_MIXTRAL = Architecture(model_type="mixtral", class_name="MixtralForCausalLM", norm_topk_prob=True)
_DEEPSEEK_V3 = Architecture(model_type="deepseek_v3", class_name="DeepseekV3ForCausalLM")
LATENT_TYPES = ("deepseek_v2", "deepseek_v3")
"""Model types of `deepseek2`."""
GROUPED_TYPES = (*LATENT_TYPES, "glm4_moe")
"""Model types whose experts may be in groups, and that predict tokens further ahead."""


def architecture_of(file: GGUFFile) -> Architecture:
    """Returns the family of the model. `llama` stands for Llama, Mistral and Mixtral, `deepseek2`
    for all that have latent attention: their scores tell them apart."""
    name = file.metadata.get("general.architecture")
    found = ARCHITECTURES.get(str(name))
    if found is None:
        raise UnsupportedModelError(
            f"{file.path}: the architecture {name!r} is unknown; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    if name == "llama" and file.metadata.get("llama.expert_count", 0) > 0:
        return _MIXTRAL
    if name == "llama" and "llama.attention.sliding_window" in file.metadata:
        return _MISTRAL
    if name == "deepseek2" and _scores_by_sigmoid(file):
        return _DEEPSEEK_V3
    return found


def _scores_by_sigmoid(file: GGUFFile) -> bool:
    """Whether a token's scores of experts are sigmoids. Files that do not say it are of
    DeepSeek-V2, or early ones of GLM-4.7-Flash, which have corrections of the choice."""
    key = "deepseek2.expert_gating_func"
    found, is_corrected = file.metadata.get(key, 0), "exp_probs_b" in map(_kind, file.tensors)
    if found not in (0, 1, 2) or (found == 1 and is_corrected):
        known = "2 (sigmoid), as there is exp_probs_b" if is_corrected else "1 or 2 (sigmoid)"
        raise UnsupportedModelError(f"{file.path}: {key} is {found!r}; known is {known}")
    return found == 2 or is_corrected


def _kind(name: str) -> str:
    """Returns what a layer's tensor is."""
    return name.split(".")[2] if name.count(".") == 3 else ""
