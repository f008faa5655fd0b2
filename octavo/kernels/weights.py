"""The parameters that ops multiply with: matrices in their storage formats, and what they make up.

Made by the loader, held by the layers. Shapes as in `ops.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.formats import WeightFormat
from octavo.kernels.routing import RoutingRule


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Weight:
    """A matrix [rows, cols] in its storage format: y = x @ W.T has `rows` columns.

    `data` is [rows, cols] in the number's torch dtype, or for block formats uint8
    [rows, row_bytes]; rows are contiguous, and the tensor may be a view of a mapped file.
    """

    data: Tensor
    format: WeightFormat
    rows: int
    cols: int
    table: Tensor | None = None
    """float32 [format.table_size], for formats that have a table."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpertWeights:
    """The gated MLPs of a MoE layer: act(x @ gate.T, x @ up.T) @ down.T, each of length E."""

    gate: tuple[Weight, ...]
    up: tuple[Weight, ...]
    down: tuple[Weight, ...]
    biases: ExpertBiases | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpertBiases:
    """What is added to the three products of every expert, float32."""

    gate_EF: Tensor
    up_EF: Tensor
    down_EM: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class SharedExpert:
    """The gated MLP of a MoE layer that every token goes through."""

    gate: Weight
    up: Weight
    down: Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Router:
    """What chooses a token's experts: a rule over the logits x @ weights[0].T + bias."""

    weights: tuple[Weight, ...]
    """[E, M], and the gate of the shared expert [1, M] where there is one."""
    rule: RoutingRule
    bias_E: Tensor | None = None
    correction_E: Tensor | None = None
    """float32, added to the scores for the choice alone."""
    scale_E: Tensor | None = None
    """float32, multiplies the weights of the chosen experts."""

    @property
    def is_plain(self) -> bool:
        """Whether rule and tensors are what back ends fuse with the products around them."""
        tensors = self.bias_E, self.correction_E, self.scale_E
        return self.rule.is_plain and all(tensor is None for tensor in tensors)


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype called float32, float16 or bfloat16."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
