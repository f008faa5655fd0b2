"""Experts whose weights have columns in an order of their own (`Weight.order`).

Called by `backend.py` when a layer is loaded, and by `choose.py` in every step. The order of down's
columns is that of hidden: gate's and up's rows are put in it once. That of gate's and up's columns
differs by expert: every pair (token, choice) gets a row of x of its own.

Shape legend: T tokens, P pairs, E experts, M hidden, F expert hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.weights import ExpertBiases, ExpertWeights, Stack


def with_rows_in_order(experts: ExpertWeights) -> ExpertWeights:
    """Returns experts of the same results whose down has its columns in the order of hidden. Puts
    the rows of gate and up in another order where they are."""
    down = experts.down
    if not isinstance(down, Stack) or down.order_EK is None:
        return experts
    order_EF = down.order_EK.long()
    for stack in (experts.gate, experts.up):
        assert isinstance(stack, Stack)
        for index, order in enumerate(order_EF):
            part = stack[index]
            for plane in part.planes or (part.data,):
                plane.copy_(plane[order])
    biases = experts.biases
    if biases is not None:
        gate_EF, up_EF = (one.gather(1, order_EF) for one in (biases.gate_EF, biases.up_EF))
        biases = ExpertBiases(gate_EF=gate_EF, up_EF=up_EF, down_EM=biases.down_EM)
    return replace(experts, down=replace(down, order_EK=None), biases=biases)


def order_of_x(gate: Stack, up: Stack) -> Tensor | None:
    """Returns the order int32 [E, M] of the columns of gate and up, None if they follow x's. Raises
    UnsupportedModelError where the two differ."""
    first, second = gate.order_EK, up.order_EK
    if first is None and second is None:
        return None
    if first is None or second is None or not torch.equal(first, second):
        raise UnsupportedModelError(
            "the experts' gates have their columns in another order (desc_act) than what they are "
            "multiplied with, which one product cannot mix; unpack the model with --dtype bfloat16"
        )
    return first


@launchable
@triton.jit
def rows_of_pairs_kernel(
    x_TM,
    ids_P,
    order_EM,
    out_PM,
    hidden_size,
    top_k,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[p, j] = x[t, order[e, j]] for the pair p = (t, choice), expert e; of no expert, the first
    one's."""
    wait_turn(OVERLAP)
    announce(OVERLAP)
    pair = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in = column < hidden_size
    expert = tl.maximum(tl.load(ids_P + pair), 0).to(tl.int64)
    place = tl.load(order_EM + expert * hidden_size + column, mask=is_in, other=0)
    x = tl.load(x_TM + pair // top_k * hidden_size + place, mask=is_in, other=0.0)
    tl.store(out_PM + pair * hidden_size + column, x, mask=is_in)


def rows_of_pairs(x_TM: Tensor, topk_ids: Tensor, order_EM: Tensor) -> Tensor:
    """Returns the row of x [P, M] of every pair, in the order of its expert's columns."""
    num_pairs, hidden_size = topk_ids.numel(), x_TM.shape[1]
    assert x_TM.is_contiguous()
    assert order_EM.is_contiguous()
    out = x_TM.new_empty((num_pairs, hidden_size))
    columns = min(1024, next_power_of_2(hidden_size))
    rows_of_pairs_kernel[(num_pairs, cdiv(hidden_size, columns))](
        x_TM,
        topk_ids,
        order_EM,
        out,
        hidden_size,
        topk_ids.shape[1],
        BLOCK_N=columns,
        **launch_options(x_TM.device),
    )
    return out
