"""Which kernels run the experts of a layer; of packed weights `choose_packed.py` says so.

Called by `backend.py`. Never looks at values.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.biases import add_biases
from octavo.kernels.triton.experts.choose_packed import Packed, run_packed
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import SHARED_TOKENS, is_few
from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.hopper import many
from octavo.kernels.triton.experts.ordered import rows_of_pairs
from octavo.kernels.triton.experts.pairs import experts_of_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts, shared_parts
from octavo.kernels.triton.experts.unpacked import unpacked_experts
from octavo.kernels.triton.tuning.shapes import Shapes
from octavo.kernels.weights import SharedExpert


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
    if experts.order_EM is not None:
        rows_PM = rows_of_pairs(x_TM, topk_ids, experts.order_EM)
        parts_PM, _ = run_experts(
            *(rows_PM, topk_weights.view(-1, 1), topk_ids.view(-1, 1)),
            *(replace(experts, order_EM=None), activation, None, None, shapes, tickets),
            is_deterministic=is_deterministic,
            in_parts=False,
        )
        return combine(parts_PM, topk_ids, experts.count), shared is None
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
        packed = Packed(
            x_TM=x_TM,
            topk_weights=topk_weights,
            topk_ids=topk_ids,
            experts=experts,
            activation=activation,
            shape=shape,
            tickets=tickets,
            is_of_pairs=is_of_pairs,
            is_deterministic=is_deterministic,
            in_parts=in_parts and is_whole,
        )
        return run_packed(packed), is_whole
    # None count where bits may not depend on how many there are; tuned blocks are of other kernels.
    num_pairs = 0 if is_deterministic or shape.block_p != many.ROWS.value else topk_ids.numel()
    if is_of_pairs:
        out = experts_of_pairs(*chosen, shapes.pairs(x_TM, top_k, experts), parts)
    elif num_pairs and parts is None and many.fits(x_TM, experts, num_pairs):
        in_parts = in_parts and is_whole and experts.biases is None
        out = unpacked_experts(*chosen, shape, num_pairs=num_pairs, in_parts=in_parts)
    else:
        in_parts = in_parts and is_whole and experts.biases is None
        out = grouped_experts(*chosen, shape, parts, in_parts=in_parts)
    if experts.biases is not None:
        add_biases(out, topk_weights, topk_ids, experts.biases.down_EM)
    return out, is_whole
