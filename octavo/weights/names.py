"""How Hugging Face checkpoints name the parts of a MoE layer, per family.

Read by the families, and by the safetensors and GGUF sources, which list stacked experts one by
one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names below `model.layers.N.`; `gate`, `up` and `down` are the three matrices."""

    block: str
    gate: str
    up: str
    down: str

    def expert(self, layer: int | str, expert: int | str, part: str) -> str:
        """Returns the full name; `part` is one of the matrix names above."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{part}.weight"

    def router(self, layer: int | str) -> str:
        return f"model.layers.{layer}.{self.block}.gate.weight"


_MIXTRAL = ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2")
_DEFAULT = ExpertNames(block="mlp", gate="gate_proj", up="up_proj", down="down_proj")


def expert_names(model_type: str) -> ExpertNames:
    """Returns the names that checkpoints of a `model_type` of config.json use."""
    return _MIXTRAL if model_type == "mixtral" else _DEFAULT
