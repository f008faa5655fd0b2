"""A layer's experts as its kernels take them: whole stacks, and a shared expert beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton.language as tl
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.kernels.planes import TILE_ROWS, Planes, has_tile_scales
from octavo.kernels.triton.experts.ordered import order_of_x
from octavo.kernels.triton.launching.numbers import compute_type
from octavo.kernels.triton.product.matrices import numbers_of
from octavo.kernels.weights import (
    ExpertBiases,
    ExpertWeights,
    SharedExpert,
    Stack,
    Weight,
)
from octavo.planes import PlaneLayout

Operand = Tensor | tuple[Tensor | int, ...]
"""A stack of numbers, or the planes of a packed one (`Planes.arguments`)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StackedExperts:
    """The experts of a layer as strided [E, rows, cols] views of whole stacks; of packed ones the
    codes, and beside them all planes [E * rows, ..]."""

    gate_EFM: Tensor
    up_EFM: Tensor
    down_EMF: Tensor
    biases: ExpertBiases | None = None
    gate_up_planes: tuple[Planes, Planes] | None = None
    gate_layout: PlaneLayout | None = None
    """Of up too."""
    down_planes: Planes | None = None
    down_layout: PlaneLayout | None = None
    gate_up_blocks: tuple[Weight, Weight] | None = None
    """Where a device keeps blocks as they are stored; `gate_EFM` and `up_EFM` have their bytes."""
    down_blocks: Weight | None = None
    order_EM: Tensor | None = None
    """int32: what column of x each of gate's and up's columns meets, if that differs by expert."""
    is_by_tile: bool = False
    """Whether scales by groups of 128 columns are the same for 128 rows too, as FP8 is published:
    what a kernel of many tokens wants to know."""

    @property
    def count(self) -> int:
        return len(self.gate_EFM)

    @property
    def inner_size(self) -> int:
        return self.gate_EFM.shape[1]

    @property
    def hidden_size(self) -> int:
        return self.down_EMF.shape[1]

    @property
    def gate_format(self) -> str:
        """As the kernels call it."""
        return "numbers" if self.gate_layout is None else self.gate_layout.name

    @property
    def down_format(self) -> str:
        """As the kernels call it."""
        return "numbers" if self.down_layout is None else self.down_layout.name

    @property
    def is_packed(self) -> bool:
        """Whether any of the matrices are."""
        return self.is_packed_gate or self.is_packed_down

    @property
    def is_packed_gate(self) -> bool:
        """Whether gate and up are."""
        return self.gate_layout is not None or self.gate_up_blocks is not None

    @property
    def is_packed_down(self) -> bool:
        return self.down_layout is not None or self.down_blocks is not None

    @property
    def has_blocks(self) -> bool:
        """Whether any of the matrices are kept as they are stored."""
        return self.gate_up_blocks is not None or self.down_blocks is not None

    @property
    def is_fp8(self) -> bool:
        """Whether all matrices are."""
        layouts = self.gate_layout, self.down_layout
        return all(one is not None and one.values == "e4m3" for one in layouts)

    @property
    def is_by_block(self) -> bool:
        """Whether any of the matrices has scales by groups of columns."""
        layouts = self.gate_layout, self.down_layout
        return any(one is not None and one.group > 0 for one in layouts)

    @property
    def has_tile_scales(self) -> bool:
        """Whether scales are the same for all rows of a tile, or one for a row."""
        return not self.is_by_block or self.is_by_tile

    def compute_type(self, x: Tensor) -> tl.dtype:
        """Returns what the factors of the products become."""
        layouts = (self.gate_EFM, self.gate_layout), (self.down_EMF, self.down_layout)
        numbers = (one for one, layout in layouts if layout is None and one.is_floating_point())
        return compute_type(x, *numbers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedParts:
    """A shared expert as `count` experts more: gate and up [count * F, M], down [M, count * F]."""

    gate_NM: Tensor
    up_NM: Tensor
    down_MN: Tensor
    gate_T1: Tensor | None
    """Logits of the gate that scales it."""
    count: int


def gate_up_arguments(
    experts: StackedExperts, shared: SharedParts | None
) -> tuple[Operand, Operand, Tensor, Tensor, Tensor, Tensor]:
    """Returns gate and up, those of the shared expert, and the experts' biases; anything where
    there are none."""
    anything = experts.gate_EFM, experts.up_EFM
    of_shared = anything if shared is None else (shared.gate_NM, shared.up_NM)
    biases = experts.biases
    of_biases = anything if biases is None else (biases.gate_EF, biases.up_EF)
    routed = experts.gate_up_planes
    if routed is None:
        return *anything, *of_shared, *of_biases
    return *(planes.arguments() for planes in routed), *of_shared, *of_biases


def down_arguments(
    experts: StackedExperts, shared: SharedParts | None, topk_weights: Tensor
) -> tuple[Operand, Tensor, Tensor]:
    """Returns down, that of the shared expert and its gate, or anything where there is none."""
    planes = experts.down_planes
    routed = experts.down_EMF if planes is None else planes.arguments()
    if shared is None:
        return routed, experts.down_EMF, topk_weights
    gate_T1 = topk_weights if shared.gate_T1 is None else shared.gate_T1
    return routed, shared.down_MN, gate_T1


def count_of_shared(shared: SharedParts | None) -> int:
    """Returns the parts of a shared expert."""
    return 0 if shared is None else shared.count


def has_gate(shared: SharedParts | None) -> bool:
    """Whether a gate scales the shared expert."""
    return shared is not None and shared.gate_T1 is not None


def stacked_experts(experts: ExpertWeights) -> StackedExperts:
    """Returns the experts of a layer as whole stacks; see `stacked_view`."""
    gate, up, down = experts.gate, experts.up, experts.down
    if isinstance(gate, Stack) and isinstance(up, Stack) and isinstance(down, Stack):
        if gate.whole.layout != up.whole.layout or (_blocks(gate) is None) != (_blocks(up) is None):
            raise UnsupportedModelError(
                f"the experts' gates are in {_format(gate)} and what they are multiplied with in "
                f"{_format(up)}, which one product cannot mix; unpack the model with --dtype "
                "bfloat16"
            )
        assert down.order_EK is None, "these ops have not prepared the experts"
        of_gate, of_up = gate.whole.planes, up.whole.planes
        return StackedExperts(
            gate_EFM=gate.whole.data.view(gate.num_matrices, gate.rows, -1),
            up_EFM=up.whole.data.view(up.num_matrices, up.rows, -1),
            down_EMF=down.whole.data.view(down.num_matrices, down.rows, -1),
            biases=experts.biases,
            gate_up_planes=None if of_gate is None or of_up is None else (of_gate, of_up),
            gate_layout=gate.whole.layout,
            down_planes=down.whole.planes,
            down_layout=down.whole.layout,
            gate_up_blocks=_both(_blocks(gate), _blocks(up)),
            down_blocks=_blocks(down),
            order_EM=order_of_x(gate, up),
            is_by_tile=_is_by_tile(gate, up, down),
        )
    return StackedExperts(
        gate_EFM=stacked_view(experts.gate),
        up_EFM=stacked_view(experts.up),
        down_EMF=stacked_view(experts.down),
        biases=experts.biases,
    )


def _blocks(stack: Stack) -> Weight | None:
    whole = stack.whole
    return whole if whole.planes is None and whole.format.is_block else None


def _both(gate: Weight | None, up: Weight | None) -> tuple[Weight, Weight] | None:
    return None if gate is None or up is None else (gate, up)


def _is_by_tile(*stacks: Stack) -> bool:
    """Whether tiles of all experts have one scale for each group of columns."""
    for stack in stacks:
        planes, layout = stack.whole.planes, stack.whole.layout
        if planes is None or layout is None or stack.rows % TILE_ROWS:
            return False
        if not has_tile_scales(planes, layout):
            return False
    return True


def _format(stack: Stack) -> str:
    layout = stack.whole.layout
    return stack.whole.format.name if layout is None else layout.name


def stacked_view(weights: Sequence[Weight]) -> Tensor:
    """Returns the experts' matrices as one [E, rows, cols] view.

    Raises AssertionError where they are not views at one constant stride of one tensor: the
    loader must put a layer's experts into one stack.
    """
    tensors = [numbers_of(weight) for weight in weights]
    first = tensors[0]
    start, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    stride = tensors[1].storage_offset() - start if len(tensors) > 1 else first.numel()
    for expert, tensor in enumerate(tensors):
        is_at = tensor.untyped_storage().data_ptr() == storage
        is_at = is_at and tensor.storage_offset() == start + expert * stride
        is_at = is_at and (expert == 0 or stride >= first.numel())
        is_at = is_at and tensor.shape == first.shape and tensor.dtype == first.dtype
        is_at = is_at and tensor.is_contiguous()
        assert is_at, (
            f"expert {expert} of {len(tensors)} does not lie at a constant stride from expert 0 "
            "in the same tensor; load the experts of a layer as views of one [E, rows, cols] stack"
        )
    return first.as_strided((len(tensors), *first.shape), (stride, *first.stride()), start)


def shared_parts(
    shared: SharedExpert | None, gate_T1: Tensor | None, inner_size: int
) -> SharedParts | None:
    """Returns the shared expert as experts of `inner_size`, or None where it is not some of them
    side by side."""
    if shared is None or shared.gate_up[0].rows % inner_size:
        return None
    if any(one.format.is_block for one in (*shared.gate_up, shared.down)):
        return None
    gate, up, down = map(numbers_of, (*shared.gate_up, shared.down))
    assert gate.is_contiguous()
    assert up.is_contiguous()
    assert down.is_contiguous()
    count = len(gate) // inner_size
    return SharedParts(gate_NM=gate, up_NM=up, down_MN=down, gate_T1=gate_T1, count=count)
