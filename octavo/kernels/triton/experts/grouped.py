"""The experts of a MoE layer: products grouped by expert, gate, up and activation in one of them.

Called by `choose.py` for more than a few pairs. One pair of kernels, which find an expert's rows in
two ways (`rows.py`) and have the same bits in both: few pairs are looked through, and a shared
expert whose hidden size is a multiple of the others' runs beside them as that many more; many are
sorted first. Never waits for the device, never adds floats atomically.

Shape legend: T tokens, P pairs (token, choice), E experts, S parts of the shared expert, M hidden,
F expert hidden. R rows of hidden: in the pairs' order; or, where they are looked through, row
t (K + S) + choice for each choice of token t, the parts of the shared expert after its K pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.activations import Activation
from octavo.kernels.triton.experts.combine import combine
from octavo.kernels.triton.experts.dispatch import SHARED_TOKENS, Dispatch, is_few
from octavo.kernels.triton.experts.grouped_kernels import down_kernel, gate_up_kernel
from octavo.kernels.triton.experts.shapes import ExpertsShape, TileShape
from octavo.kernels.triton.experts.sort import sort_pairs
from octavo.kernels.triton.experts.stacks import (
    SharedParts,
    StackedExperts,
    count_of_shared,
    down_arguments,
    gate_up_arguments,
    has_gate,
)
from octavo.kernels.triton.launching.overlap import launch_options
from octavo.kernels.triton.small.group_sums import group_sums
from octavo.kernels.triton.tiles.activation import activation_constant


def grouped_experts(
    x_TM: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    experts: StackedExperts,
    activation: Activation,
    shape: ExpertsShape,
    shared: SharedParts | None = None,
    *,
    is_scanned: bool | None = None,
    in_parts: bool = False,
) -> Tensor:
    """Returns [T, M]: the weighted sum of the chosen experts' gated MLPs, in the order of choices,
    plus the shared expert (not with TMA; of pairs that are looked through SHARED_TOKENS at most);
    or what is to be added,
    [T, K + S, M], where rows of experts that are not here hold anything. `is_scanned`: whether
    pairs are looked through; None: if they are few."""
    assert x_TM.is_contiguous()
    assert topk_ids.is_contiguous()
    assert topk_weights.is_contiguous()
    assert topk_weights.dtype is torch.float32
    assert topk_ids.dtype is torch.int32
    num_tokens, hidden_size = x_TM.shape
    if not num_tokens:
        return torch.empty_like(x_TM)
    is_scanned = is_few(topk_ids) if is_scanned is None else is_scanned
    assert not is_scanned or is_few(topk_ids), topk_ids.shape
    assert shared is None or not is_scanned or num_tokens <= SHARED_TOKENS, topk_ids.shape
    dispatch = Dispatch(
        topk_ids=topk_ids,
        pairs=None if is_scanned else sort_pairs(topk_ids, experts.count, shape.block_p),
        num_experts=experts.count,
        num_shared=count_of_shared(shared),
        rows=shape.block_p,
    )
    hidden = gate_up(x_TM, dispatch, experts, activation, shape.gate_up, shared)
    parts = down(hidden, topk_weights, dispatch, experts, shape.down, shared)
    if in_parts:
        return parts.view(num_tokens, -1, hidden_size)
    return combine(parts, topk_ids, experts.count, dispatch.num_shared)


def gate_up(
    x_TM: Tensor,
    dispatch: Dispatch,
    experts: StackedExperts,
    activation: Activation,
    shape: TileShape,
    shared: SharedParts | None = None,
    *,
    out_RF: Tensor | None = None,
) -> Tensor:
    """Returns hidden [R, F], undefined where a pair's expert is not here; or writes those that are
    to `out_RF`."""
    hidden = out_RF
    if hidden is None:
        hidden = x_TM.new_empty((dispatch.num_rows, experts.inner_size))
    is_tma = shape.tma and dispatch.pairs is not None
    gate, up, *of_shared = gate_up_arguments(experts, shared)
    gate_up_kernel[dispatch.grid(experts.inner_size, shape)](
        x_TM,
        group_sums(x_TM, experts.gate_layout),
        _tiles(experts.gate_EFM, shape) if is_tma else gate,
        _tiles(experts.up_EFM, shape) if is_tma else up,
        *of_shared,
        hidden,
        *dispatch.arguments(),
        experts.hidden_size,
        experts.inner_size,
        experts.gate_EFM.stride(0),
        experts.up_EFM.stride(0),
        **dispatch.constants(),
        **shape.constants(experts.hidden_size, is_tma=is_tma, layout=experts.gate_layout),
        HAS_BIAS=experts.biases is not None,
        ACTIVATION=activation_constant(activation),
        COMPUTE=experts.compute_type(x_TM),
        FORMAT=experts.gate_format,
        **launch_options(x_TM.device),
    )
    return hidden


def down(
    hidden_RF: Tensor,
    topk_weights: Tensor,
    dispatch: Dispatch,
    experts: StackedExperts,
    shape: TileShape,
    shared: SharedParts | None = None,
) -> Tensor:
    """Returns the weighted parts [P, M] in the order of the pairs' numbers, or [T (K + S), M]."""
    parts = hidden_RF.new_empty((dispatch.num_rows, experts.hidden_size))
    is_tma = shape.tma and dispatch.pairs is not None
    stack, shared_down, gate_T1 = down_arguments(experts, shared, topk_weights)
    rows = half = hidden_RF
    if is_tma:
        rows, half = (
            TensorDescriptor.from_tensor(hidden_RF, [height, shape.block_k])
            for height in (dispatch.rows, dispatch.rows // 2)
        )
    down_kernel[dispatch.grid(experts.hidden_size, shape)](
        rows,
        half,
        group_sums(hidden_RF, experts.down_layout),
        _tiles(experts.down_EMF, shape) if is_tma else stack,
        shared_down,
        gate_T1,
        parts,
        topk_weights,
        *dispatch.arguments(),
        experts.hidden_size,
        experts.inner_size,
        experts.down_EMF.stride(0),
        gate_T1.stride(0),
        **dispatch.constants(),
        HAS_GATE=has_gate(shared),
        **shape.constants(experts.inner_size, is_tma=is_tma, layout=experts.down_layout),
        COMPUTE=experts.compute_type(hidden_RF),
        FORMAT=experts.down_format,
        **launch_options(hidden_RF.device),
    )
    return parts


def _tiles(stack: Tensor, shape: TileShape) -> TensorDescriptor:
    block = [1, shape.block_n, shape.block_k]
    return TensorDescriptor(stack, list(stack.shape), list(stack.stride()), block)
