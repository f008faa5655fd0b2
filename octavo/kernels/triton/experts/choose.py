"""Which kernels run the experts of a layer: the only place that chooses.

Called by `backend.py`. Never looks at values.
"""

from __future__ import annotations

from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.facts import UNPACKED_ROWS
from octavo.kernels.triton.experts.biases import add_biases
from octavo.kernels.triton.experts.dispatch import SHARED_TOKENS, is_few
from octavo.kernels.triton.experts.fp8 import fp8_experts
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.hopper import ring
from octavo.kernels.triton.experts.hopper.fp8 import fits, hopper_fp8_experts
from octavo.kernels.triton.experts.packed_pairs import packed_experts_of_pairs
from octavo.kernels.triton.experts.pairs import experts_of_pairs
from octavo.kernels.triton.experts.shapes import (
    ExpertsShape,
    experts_shape,
    fp8_experts_shape,
    packed_pairs_shape,
    ring_experts_shape,
)
from octavo.kernels.triton.experts.stacks import StackedExperts, shared_parts
from octavo.kernels.triton.experts.unpacked import unpacked_experts
from octavo.kernels.triton.launching.chip import is_hopper
from octavo.kernels.triton.tuning.shapes import Shapes
from octavo.kernels.weights import SharedExpert

FP8_ROWS = 32
"""Of an expert, in the mean: from here on activations are rounded to FP8 where weights are FP8 with
a scale a row. With scales by blocks, tensor cores of FP8 are slower than those of bfloat16."""


def run_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shared: SharedExpert | None,
    gate_T1: Tensor | None,
    shapes: Shapes,
    tickets: Tensor | None = None,
    *,
    is_deterministic: bool,
    in_parts: bool,
) -> tuple[Tensor, bool]:
    """Returns what `Ops.moe` does, and whether the shared expert is in it: else it is still to be
    added, and the result is no parts. `tickets`: see `make_tickets`."""
    top_k = topk_ids.shape[1]
    shape = shapes.experts(x_TM, top_k, experts)
    is_of_pairs = shape.is_direct and not is_deterministic
    parts = None
    if not (experts.is_packed or is_deterministic):
        if is_of_pairs:
            is_fitting = len(x_TM) == 1
        elif is_few(topk_ids):
            is_fitting = len(x_TM) <= SHARED_TOKENS
        else:
            is_fitting = not (shape.gate_up.tma or shape.down.tma)
        parts = shared_parts(shared, gate_T1, experts.inner_size) if is_fitting else None
    is_whole = shared is None or parts is not None
    chosen = x_TM, topk_weights, topk_ids, experts, activation
    if experts.is_packed:
        in_parts = in_parts and is_whole and experts.biases is None
        out = _run_packed(
            *(*chosen, shape, tickets),
            is_of_pairs=is_of_pairs,
            is_deterministic=is_deterministic,
            in_parts=in_parts,
        )
    elif is_of_pairs:
        out = experts_of_pairs(*chosen, shapes.pairs(x_TM, top_k, experts), parts)
    else:
        in_parts = in_parts and is_whole and experts.biases is None
        out = grouped_experts(*chosen, shape, parts, in_parts=in_parts)
    if experts.biases is not None:
        add_biases(out, topk_weights, topk_ids, experts.biases.down_EM)
    return out, is_whole


def _run_packed(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: ExpertsShape,
    tickets: Tensor | None,
    *,
    is_of_pairs: bool,
    is_deterministic: bool,
    in_parts: bool,
) -> Tensor:
    """Returns what `run_experts` does of experts with packed weights, or with some of them."""
    gate, down = experts.gate_layout, experts.down_layout
    chosen = x_TM, topk_weights, topk_ids, experts, activation
    sizes = experts.hidden_size, experts.inner_size
    is_ring = not is_deterministic and ring.fits(x_TM, experts)
    if is_of_pairs and not is_ring and gate is not None and down is not None:
        of_pairs = packed_pairs_shape(gate, down, *sizes, topk_ids.shape[1])
        return packed_experts_of_pairs(*chosen, of_pairs)
    num_pairs = 0 if is_deterministic else topk_ids.numel()
    if not (is_deterministic or is_of_pairs) and fits(x_TM, experts, activation, num_pairs):
        return hopper_fp8_experts(x_TM, topk_weights, topk_ids, experts, in_parts=in_parts)
    is_fp8 = experts.is_fp8 and not experts.is_by_block
    if is_fp8 and num_pairs >= FP8_ROWS * experts.count:
        of_fp8 = fp8_experts_shape(*topk_ids.shape, experts.count)
        return fp8_experts(*chosen, of_fp8, in_parts=in_parts)
    is_ring = is_ring and num_pairs <= UNPACKED_ROWS * experts.count
    if is_ring and gate is not None and down is not None:
        of_ring = ring_experts_shape(
            *(*topk_ids.shape, experts.count, *sizes, gate, down), is_lone=is_of_pairs
        )
        # A lone token's next norm may stand within a product, which takes one row and no parts.
        in_parts = in_parts and not is_of_pairs
        return ring.ring_experts(*chosen, of_ring, tickets, in_parts=in_parts)
    if num_pairs > UNPACKED_ROWS * experts.count:
        numbers = unpacked_experts(experts, x_TM.dtype)
        many = experts_shape(
            *(len(x_TM), topk_ids.shape[1], experts.count, experts.inner_size),
            can_tma=is_hopper(x_TM.device),
        )
        chosen, shape = (x_TM, topk_weights, topk_ids, numbers, activation), many
    return grouped_experts(*chosen, shape, in_parts=in_parts)
