"""The parameters that ops multiply with: matrices in their storage formats, and what they make up.

Made by the loader, held by the layers. Shapes as in `ops.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from octavo.formats import WeightFormat
from octavo.kernels.planes import Planes
from octavo.kernels.routing import RoutingRule
from octavo.planes import PlaneLayout


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
    planes: Planes | None = None
    """On a device, what packed rows became there; `data` has the codes."""
    layout: PlaneLayout | None = None
    """Of the planes."""
    is_by_tile: bool = False
    """Whether a device has found that `has_tile_scales` is true of the planes."""
    within: Within | None = None
    """Where it lies among others, if it was placed with them."""
    order: Tensor | None = None
    """int32 [cols]: the column of x that each column of packed rows is multiplied with, where
    columns that share a scale were brought together; None: they follow x's."""
    prepared: object = None
    """What a back end made of it (`Ops.prepare`)."""

    def part(self, start: int, stop: int) -> Weight:
        """Returns the weight of some rows, a view."""
        return replace(
            self,
            data=self.data[start:stop],
            rows=stop - start,
            planes=None if self.planes is None else self.planes.rows(start, stop),
            within=None,
            prepared=None,
        )

    def parts(self, rows: Sequence[int]) -> tuple[Weight, ...]:
        """Returns views of so many rows each, one after the other, which know that they are."""
        starts = accumulate(rows, initial=0)
        return tuple(
            replace(self.part(start, start + count), within=Within(whole=self, start=start))
            for start, count in zip(starts, rows, strict=False)
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Within:
    """A place among matrices that lie one after the other, so that one product serves several."""

    whole: Weight
    start: int
    """The first row."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Together(Sequence[Weight]):
    """Weights that are multiplied at once, with what a back end made of them (`Ops.prepare`)."""

    weights: tuple[Weight, ...]
    prepared: object

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> Weight:  # type: ignore[override]
        return self.weights[index]

    def __iter__(self) -> Iterator[Weight]:
        return iter(self.weights)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Stack(Sequence[Weight]):
    """Matrices of one shape and format that lie one after the other: an expert's each."""

    whole: Weight
    """[num_matrices * rows, cols]."""
    num_matrices: int
    order_EK: Tensor | None = None
    """The `Weight.order` of each matrix, where some have one."""

    @property
    def rows(self) -> int:
        """Of one of them."""
        return self.whole.rows // self.num_matrices

    def __len__(self) -> int:
        return self.num_matrices

    def __getitem__(self, index: int) -> Weight:  # type: ignore[override]
        if not 0 <= index < self.num_matrices:
            raise IndexError(index)
        part = self.whole.part(index * self.rows, (index + 1) * self.rows)
        return part if self.order_EK is None else replace(part, order=self.order_EK[index])

    def __iter__(self) -> Iterator[Weight]:
        return (self[index] for index in range(self.num_matrices))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpertWeights:
    """The gated MLPs of a MoE layer: act(x @ gate.T, x @ up.T) @ down.T, each of length E."""

    gate: Sequence[Weight]
    up: Sequence[Weight]
    down: Sequence[Weight]
    """A `Stack` each on a device; else matrices where their file has them."""
    biases: ExpertBiases | None = None
    prepared: object = None
    """What a back end made of them (`Ops.prepare_experts`)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class ExpertBiases:
    """What is added to the three products of every expert, float32."""

    gate_EF: Tensor
    up_EF: Tensor
    down_EM: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class SharedExpert:
    """The gated MLP of a MoE layer that every token goes through."""

    gate_up: Sequence[Weight]
    """Gate and up."""
    down: Weight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Router:
    """What chooses a token's experts: a rule over the logits x @ weights[0].T + bias."""

    weights: Sequence[Weight]
    """[E, M], and the gate of the shared expert [1, M] where there is one."""
    rule: RoutingRule
    bias_E: Tensor | None = None
    correction_E: Tensor | None = None
    """float32, added to the scores for the choice alone."""
    scale_E: Tensor | None = None
    """float32, multiplies the weights of the chosen experts."""
    held: range | None = None
    """Where ranks share whole experts, those that this one has: ids count from the first of them,
    and are -1 for the others."""

    def held_of(self, num_experts: int) -> tuple[int, int]:
        """Returns the first expert that is held, and how many are."""
        held = range(num_experts) if self.held is None else self.held
        return held.start, len(held)

    def held_ids(self, topk_ids: Tensor) -> Tensor:
        """Returns ids among the experts that are held, -1 for those of other ranks."""
        if self.held is None:
            return topk_ids
        local = topk_ids - self.held.start
        return torch.where((local >= 0) & (local < len(self.held)), local, -1)

    @property
    def is_plain(self) -> bool:
        """Whether rule and tensors are what back ends fuse with the products around them."""
        tensors = self.bias_E, self.correction_E, self.scale_E
        return self.rule.is_plain and all(tensor is None for tensor in tensors)

    @property
    def is_softmax(self) -> bool:
        """Whether the weights are softmax of the logits, over all or the chosen ones: what can be
        made within the product of one row, with the bias."""
        is_known = self.rule.is_plain or self.rule.is_softmax_of_chosen
        return is_known and self.correction_E is None and self.scale_E is None


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype called float32, float16 or bfloat16."""
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[name]
