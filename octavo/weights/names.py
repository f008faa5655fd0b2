"""How Hugging Face checkpoints name the parts of a MoE layer, per family.

Read by the families, and by the safetensors and GGUF sources, which list stacked experts one by
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names below `model.layers.N.`."""

    block: str
    parts: Mapping[str, str]
    """Of the matrices that we call gate, up and down."""

    def expert(self, layer: int | str, expert: int | str, part: str) -> str:
        """Returns the full name of a matrix; `part` is gate, up or down."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.parts[part]}.weight"

    def router(self, layer: int | str) -> str:
        return f"model.layers.{layer}.{self.block}.gate.weight"


_MIXTRAL = ExpertNames(block="block_sparse_moe", parts={"gate": "w1", "up": "w3", "down": "w2"})
_DEFAULT = ExpertNames(block="mlp", parts={part: f"{part}_proj" for part in ("gate", "up", "down")})


def expert_names(model_type: str) -> ExpertNames:
    """Returns the names that checkpoints of a `model_type` of config.json use."""
    return _MIXTRAL if model_type == "mixtral" else _DEFAULT
