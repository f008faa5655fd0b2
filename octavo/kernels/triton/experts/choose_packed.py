"""Which kernels run the experts of a layer whose weights are packed, or some of them.

Called by `choose.py`. `KERNELS` are asked in their order. Never looks at values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.facts import unpacks_experts
from octavo.kernels.triton.experts.biases import add_biases
from octavo.kernels.triton.experts.fp8 import fp8_experts
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.hopper import fp8 as hopper_fp8
from octavo.kernels.triton.experts.hopper import ring
from octavo.kernels.triton.experts.packed_pairs import packed_experts_of_pairs
from octavo.kernels.triton.experts.shapes import (
    ExpertsShape,
    experts_shape,
    fp8_experts_shape,
    packed_pairs_shape,
    ring_experts_shape,
)
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.experts.unpacked import unpacked_experts
from octavo.kernels.triton.launching.chip import is_hopper

FP8_ROWS = 32
"""Of an expert, in the mean: from here on activations are rounded to FP8 where weights are FP8 with
a scale a row. With scales by blocks, tensor cores of FP8 are slower than those of bfloat16."""

LARGE_INNER = 4096
"""Of an expert whose rows alone are enough programs to keep memory busy."""
RING_ROWS = 64
"""Of an expert, in the mean: beyond, `ring.py` takes longer than `grouped.py` for groups of
NARROW_GROUP columns and less, since it multiplies each by itself."""
NARROW_GROUP = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Packed:
    """What is to be run."""

    x_TM: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    experts: StackedExperts
    activation: Activation
    shape: ExpertsShape
    """Of kernels for any format."""
    tickets: Tensor | None
    is_of_pairs: bool
    """Pairs go one by one."""
    is_deterministic: bool
    in_parts: bool
    """Whether the result may be [T, top_k, M], yet to be summed."""

    @property
    def chosen(self) -> tuple[Tensor, Tensor, Tensor, StackedExperts, Activation]:
        """The first arguments of what runs experts."""
        return self.x_TM, self.topk_weights, self.topk_ids, self.experts, self.activation

    @property
    def num_pairs(self) -> int:
        """None count where bits may not depend on how many there are."""
        return 0 if self.is_deterministic else self.topk_ids.numel()

    @property
    def are_many(self) -> bool:
        experts = self.experts
        sizes = experts.count, experts.inner_size, experts.hidden_size
        return unpacks_experts(self.num_pairs, *sizes)

    @property
    def is_narrow(self) -> bool:
        """Whether any of the matrices have narrow groups."""
        layouts = self.experts.gate_layout, self.experts.down_layout
        return any(layout is not None and 0 < layout.group <= NARROW_GROUP for layout in layouts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One way to run them."""

    fits: Callable[[Packed], bool]
    run: Callable[[Packed], Tensor]
    """In parts, if they are wanted, but for a lone token: its next norm may stand within a product,
    which takes one row and no parts."""
    has_biases: bool = False
    """Whether the result has the biases of the last products; those of the first it always has."""


def _fits_hopper_fp8(one: Packed) -> bool:
    if one.is_deterministic or one.is_of_pairs:
        return False
    return hopper_fp8.fits(one.x_TM, one.experts, one.activation, one.num_pairs)


def _run_hopper_fp8(one: Packed) -> Tensor:
    return hopper_fp8.hopper_fp8_experts(
        one.x_TM, one.topk_weights, one.topk_ids, one.experts, in_parts=one.in_parts
    )


def _fits_fp8(one: Packed) -> bool:
    is_by_row = one.experts.is_fp8 and not one.experts.is_by_block
    return is_by_row and one.num_pairs >= FP8_ROWS * one.experts.count


def _run_fp8(one: Packed) -> Tensor:
    shape = fp8_experts_shape(*one.topk_ids.shape, one.experts.count)
    return fp8_experts(*one.chosen, shape, in_parts=one.in_parts)


def _fits_ring(one: Packed) -> bool:
    if one.is_deterministic or one.are_many:
        return False
    if one.is_narrow and one.num_pairs > RING_ROWS * one.experts.count:
        return False
    # A lone token's FP8 of small experts is all asked for at once by pairs: sooner than by a ring.
    is_small = one.experts.is_fp8 and one.experts.inner_size < LARGE_INNER
    return not (one.is_of_pairs and is_small) and ring.fits(one.x_TM, one.experts)


def _run_ring(one: Packed) -> Tensor:
    experts = one.experts
    assert experts.gate_layout is not None
    assert experts.down_layout is not None
    shape = ring_experts_shape(
        *(*one.topk_ids.shape, experts.count, experts.hidden_size, experts.inner_size),
        *(experts.gate_layout, experts.down_layout),
        is_lone=one.is_of_pairs,
    )
    in_parts = one.in_parts and not one.is_of_pairs
    return ring.ring_experts(*one.chosen, shape, one.tickets, in_parts=in_parts)


def _fits_pairs(one: Packed) -> bool:
    layouts = one.experts.gate_layout, one.experts.down_layout
    return one.is_of_pairs and None not in layouts


def _run_pairs(one: Packed) -> Tensor:
    experts = one.experts
    assert experts.gate_layout is not None
    assert experts.down_layout is not None
    shape = packed_pairs_shape(
        *(experts.gate_layout, experts.down_layout, experts.hidden_size, experts.inner_size),
        one.topk_ids.shape[1],
    )
    return packed_experts_of_pairs(*one.chosen, shape)


def _run_unpacked(one: Packed) -> Tensor:
    shape = experts_shape(
        *(*one.topk_ids.shape, one.experts.count, one.experts.inner_size),
        can_tma=is_hopper(one.x_TM.device),
    )
    shape = shape if one.x_TM.dtype.itemsize == 2 else shape.of_floats()
    return unpacked_experts(*one.chosen, shape, num_pairs=one.num_pairs, in_parts=one.in_parts)


def _run_grouped(one: Packed) -> Tensor:
    return grouped_experts(*one.chosen, one.shape, in_parts=one.in_parts)


KERNELS = (
    Kernel(fits=lambda one: one.experts.has_blocks, run=_run_unpacked),
    Kernel(fits=_fits_hopper_fp8, run=_run_hopper_fp8),
    Kernel(fits=_fits_fp8, run=_run_fp8),
    Kernel(fits=_fits_ring, run=_run_ring, has_biases=True),
    Kernel(fits=_fits_pairs, run=_run_pairs),
    Kernel(fits=lambda one: one.are_many, run=_run_unpacked),
    Kernel(fits=lambda one: True, run=_run_grouped),
)
"""The first that fits runs."""


def run_packed(one: Packed) -> Tensor:
    """Returns the weighted sums of the experts' results [T, M], with their biases; or their
    parts."""
    kernel = next(kernel for kernel in KERNELS if kernel.fits(one))
    biases = one.experts.biases
    if biases is None or kernel.has_biases:
        return kernel.run(one)
    out = kernel.run(replace(one, in_parts=False))
    return add_biases(out, one.topk_weights, one.topk_ids, biases.down_EM)
