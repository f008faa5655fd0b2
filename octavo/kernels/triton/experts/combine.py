"""The sum of what a token's experts gave, in the order of its choices.

Called by `grouped.py`, unless the next norm adds the parts. Never adds floats atomically.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn


@launchable
@triton.jit
def combine_kernel(
    parts_RM,
    ids_P,
    out_TM,
    hidden_size,
    num_experts,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out[t] = sum of parts[t * (TOP_K + SHARED) + choice] in the order of choices.

    Those of ids outside [0, E) add 0; the SHARED last ones have no ids."""
    wait_turn(OVERLAP)
    announce(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_in = column < hidden_size
    total = tl.zeros([BLOCK_N], tl.float32)
    for choice in tl.static_range(TOP_K + SHARED):
        is_here = is_in
        if choice < TOP_K:
            expert = tl.load(ids_P + token * TOP_K + choice)
            is_here = is_in & (expert >= 0) & (expert < num_experts)
        at = parts_RM + (token * (TOP_K + SHARED) + choice) * hidden_size + column
        total += tl.load(at, mask=is_here, other=0.0).to(tl.float32)
    tl.store(out_TM + token * hidden_size + column, total.to(out_TM.dtype.element_ty), mask=is_in)


def combine(parts_RM: Tensor, topk_ids: Tensor, num_experts: int, shared: int = 0) -> Tensor:
    """Returns [T, M], every token's parts summed in the order of its choices, after which it has
    `shared` parts of a shared expert."""
    num_tokens, top_k = topk_ids.shape
    hidden_size = parts_RM.shape[1]
    out = parts_RM.new_empty((num_tokens, hidden_size))
    columns = min(1024, next_power_of_2(hidden_size))
    combine_kernel[(num_tokens, cdiv(hidden_size, columns))](
        parts_RM,
        topk_ids,
        out,
        hidden_size,
        num_experts,
        TOP_K=top_k,
        SHARED=shared,
        BLOCK_N=columns,
        **launch_options(topk_ids.device),
    )
    return out
