"""How Hugging Face checkpoints name the parts of a MoE layer, per family.

Read by the families, and by the safetensors and GGUF sources, which list stacked experts one by
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

GateUpLayout = Literal["rows", "columns", "alternating columns"]
"""Where a stack has gate and up: gate's rows before up's ([E, 2F, M]), or transposed ([E, M, 2F]),
gate's columns before up's or taking turns. Transposed stacks have down transposed too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """Names below `model.layers.N.`."""

    block: str = "mlp"
    parts: Mapping[str, str] = field(
        default_factory=lambda: {part: f"{part}_proj" for part in ("gate", "up", "down")}
    )
    """Of the matrices that we call gate, up and down."""
    router_name: str = "gate"
    layout: GateUpLayout = "rows"
    """Of stacks, if a checkpoint has its experts stacked."""

    def expert(
        self, layer: int | str, expert: int | str, part: str, *, kind: str = "weight"
    ) -> str:
        """Returns the full name of a matrix; `part` is gate, up or down, `kind` weight or bias."""
        return f"model.layers.{layer}.{self.block}.experts.{expert}.{self.parts[part]}.{kind}"

    def router(self, layer: int | str) -> str:
        return f"model.layers.{layer}.{self.block}.{self.router_name}.weight"

    def correction(self, layer: int | str) -> str:
        """Returns the name of what is added to the router's scores for the choice alone."""
        return f"model.layers.{layer}.{self.block}.{self.router_name}.e_score_correction_bias"


_DEFAULT = ExpertNames()
_LLAMA4 = ExpertNames(block="feed_forward", router_name="router", layout="columns")
_NAMES = {
    "mixtral": ExpertNames(
        block="block_sparse_moe", parts={"gate": "w1", "up": "w3", "down": "w2"}
    ),
    "gpt_oss": ExpertNames(router_name="router", layout="alternating columns"),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}
_TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
"""Where checkpoints of models that also see keep the text model; transformers 4 and 5."""
_BARE = ("embed_tokens.", "layers.", "norm.")
"""How names begin in checkpoints of a model without any head."""


def expert_names(model_type: str) -> ExpertNames:
    """Returns the names that checkpoints of a `model_type` of config.json use."""
    return _NAMES.get(model_type, _DEFAULT)


def checkpoint_names(name: str) -> Iterator[str]:
    """Yields the names that `text_name` makes this one of."""
    yield name
    for prefix, plain in _TEXT_PREFIXES.items():
        if name.startswith(plain):
            yield prefix + name.removeprefix(plain)
    if name.startswith("model."):
        yield name.removeprefix("model.")


def text_name(name: str) -> str:
    """Returns a tensor's name as the text model alone would have it."""
    for prefix, plain in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return plain + name.removeprefix(prefix)
    return f"model.{name}" if name.startswith(_BARE) else name
