"""Rows of the embedding table.

Called by `backend.py`. An id outside the vocabulary gives a row of NaN: the device cannot raise.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn

BLOCK = 1024


@launchable
@triton.jit
def embedding_kernel(
    ids_T,
    table_VM,
    out_TM,
    num_rows,
    hidden_size,
    stride,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = table[ids[t]]. ids_T int32; table_VM [V, M], rows strided; out_TM [T, M]."""
    wait_turn(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = column < hidden_size
    row = tl.load(ids_T + token).to(tl.int64)
    is_known = is_in & (row >= 0) & (row < num_rows)
    value = tl.load(table_VM + row * stride + column, mask=is_known, other=float("nan"))
    tl.store(out_TM + token * hidden_size + column, value.to(out_TM.dtype.element_ty), mask=is_in)


def embedding(ids_T: Tensor, table_VM: Tensor) -> Tensor:
    """Returns the rows `ids_T` of the table as [T, M], in its dtype."""
    num_rows, hidden_size = table_VM.shape
    assert hidden_size == 1 or table_VM.stride(1) == 1
    out = torch.empty((len(ids_T), hidden_size), dtype=table_VM.dtype, device=table_VM.device)
    if len(ids_T):
        block = min(BLOCK, next_power_of_2(hidden_size))
        embedding_kernel[(len(ids_T), cdiv(hidden_size, block))](
            ids_T,
            table_VM,
            out,
            num_rows,
            hidden_size,
            table_VM.stride(0),
            BLOCK=block,
            **launch_options(out.device),
        )
    return out
