"""The kernels of `grouped.py`: both products of a layer's experts.

Rows are found in two ways (`rows.py`) and have the same bits in both.

Shape legend: T tokens, P pairs (token, choice), E experts, S parts of the shared expert, M hidden,
F expert hidden. R rows of hidden: in the pairs' order; or, where they are looked through, row
t (K + S) + choice for each choice of token t, the parts of the shared expert after its K pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from octavo.kernels.triton.experts.products import down_rows, gate_up_rows
from octavo.kernels.triton.experts.rows import (
    count_of,
    rows_at,
    rows_of_shared,
    work_of_program,
)
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import wait_turn


@launchable
@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def gate_up_kernel(
    x_TM,
    sums_GT,
    gate_EFM,
    up_EFM,
    shared_gate_NM,
    shared_up_NM,
    gate_bias_EF,
    up_bias_EF,
    hidden_RF,
    ids_P,
    order_P,
    blocks_3B,
    num_tokens,
    num_blocks,
    num_experts,
    hidden_size,
    inner_size,
    gate_stride,
    up_stride,
    ROWS_FROM: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """hidden[r] = act(x[t] @ gate[e].T, x[t] @ up[e].T) for every pair of an expert e.

    x_TM [T, M]; gate and up [E, F, M] with stride_E given; biases float32 [E, F], HAS_BIAS.
    sums_GT: `group_sums` of x, where packed weights want them.
    ROWS_FROM "order": a program has a block of up to ROWS ordered pairs; HALVES: one that is at
    most half full runs at half height; TMA: gate and up are tensor descriptors of blocks
    [1, BLOCK_N, BLOCK_K]. "scan": it has an expert, ROWS pairs at a time. In both, others have one
    of the SHARED parts of the shared expert, whose rows are all tokens. EVEN_K: BLOCK_K divides the
    length of the sum.
    """
    wait_turn(OVERLAP)
    num_columns = tl.cdiv(inner_size, BLOCK_N)
    expert, part, column, first, end = work_of_program(
        blocks_3B, num_blocks, num_columns, num_tokens, ROWS_FROM, SHARED, ROWS, GROUP
    )
    if ROWS_FROM == "order" and (part < 0) & ((expert < 0) | (expert >= num_experts)):
        return
    column *= BLOCK_N
    if SHARED > 0 and part >= 0:
        skipped = part.to(tl.int64) * inner_size * hidden_size
        if ROWS_FROM == "scan":
            end = num_tokens
        for start in range(first, end, SHARED_ROWS):
            gate_up_rows(
                *(x_TM, sums_GT, num_tokens, shared_gate_NM + skipped, shared_up_NM + skipped),
                *(gate_bias_EF, up_bias_EF, hidden_RF, hidden_size, inner_size, expert, column),
                rows_of_shared(part, start, num_tokens, ROWS_FROM, TOP_K, SHARED, SHARED_ROWS),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, False, ACTIVATION, COMPUTE, FORMAT),
            )
    else:
        if FORMAT == "numbers" and not TMA:
            gate_EFM += expert.to(tl.int64) * gate_stride
            up_EFM += expert.to(tl.int64) * up_stride
        matrices = (x_TM, sums_GT, num_tokens, gate_EFM, up_EFM, gate_bias_EF, up_bias_EF)
        place = (hidden_RF, hidden_size, inner_size, expert, column)
        num_pairs = num_tokens * TOP_K
        if ROWS_FROM == "scan":
            count = count_of(expert, ids_P, num_pairs, TILE)
            for start in range(0, count, ROWS):
                gate_up_rows(
                    *(
                        x_TM,
                        sums_GT,
                        num_tokens,
                        gate_EFM,
                        up_EFM,
                        gate_bias_EF,
                        up_bias_EF,
                        hidden_RF,
                    ),
                    *(hidden_size, inner_size, expert, column),
                    rows_at(
                        *(start, count, expert, ids_P, order_P, num_pairs),
                        *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
                    ),
                    *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE, FORMAT),
                )
        elif HALVES and end - first <= ROWS // 2:
            gate_up_rows(
                *matrices,
                *place,
                rows_at(
                    *(first, end, expert, ids_P, order_P, num_pairs),
                    *(ROWS_FROM, TOP_K, SHARED, ROWS // 2, TILE),
                ),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE, FORMAT),
            )
        else:
            gate_up_rows(
                *matrices,
                *place,
                rows_at(
                    *(first, end, expert, ids_P, order_P, num_pairs),
                    *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
                ),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, HAS_BIAS, ACTIVATION, COMPUTE, FORMAT),
            )


@launchable
@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def down_kernel(
    hidden_RF,
    half_RF,
    sums_GR,
    down_EMF,
    shared_down_MN,
    shared_gate_T1,
    parts_RM,
    weights_P,
    ids_P,
    order_P,
    blocks_3B,
    num_tokens,
    num_blocks,
    num_experts,
    hidden_size,
    inner_size,
    down_stride,
    shared_stride,
    ROWS_FROM: tl.constexpr,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    HALVES: tl.constexpr,
    TILE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    COMPUTE: tl.constexpr,
    FORMAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """parts[p] = weights[p] * hidden[r] @ down[e].T for every pair p of an expert e.

    hidden_RF [R, F]; down [E, M, F] with stride_E given; parts_RM [P, M] in the order of pairs, or
    like hidden where pairs are looked through. The weight of the shared expert's parts is
    sigmoid(shared_gate[t]), or 1. The rest as in `gate_up_kernel`; with TMA hidden is a descriptor
    of [ROWS, BLOCK_K] and half one of [ROWS / 2, BLOCK_K], else they are the same.
    """
    wait_turn(OVERLAP)
    num_columns = tl.cdiv(hidden_size, BLOCK_N)
    expert, part, column, first, end = work_of_program(
        blocks_3B, num_blocks, num_columns, num_tokens, ROWS_FROM, SHARED, ROWS, GROUP
    )
    if ROWS_FROM == "order" and (part < 0) & ((expert < 0) | (expert >= num_experts)):
        return
    column *= BLOCK_N
    num_rows = num_tokens * (TOP_K + SHARED)
    if SHARED > 0 and part >= 0:
        if ROWS_FROM == "scan":
            end = num_tokens
        for start in range(first, end, SHARED_ROWS):
            rows = rows_of_shared(part, start, num_tokens, ROWS_FROM, TOP_K, SHARED, SHARED_ROWS)
            weight = tl.full([SHARED_ROWS], 1.0, tl.float32)
            if HAS_GATE:
                gate = tl.load(shared_gate_T1 + rows[1] * shared_stride, mask=rows[4], other=0.0)
                weight = 1.0 / (1.0 + tl.exp(-gate.to(tl.float32)))
            down_rows(
                *(
                    hidden_RF,
                    sums_GR,
                    num_rows,
                    shared_down_MN + part * inner_size,
                    parts_RM,
                ),
                *(hidden_size, inner_size, inner_size * SHARED, expert, column, 0, rows, weight),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
            )
    else:
        if FORMAT == "numbers" and not TMA:
            down_EMF += expert.to(tl.int64) * down_stride
        of_rows = sums_GR, num_rows, down_EMF, parts_RM, hidden_size, inner_size, inner_size
        num_pairs = num_tokens * TOP_K
        if ROWS_FROM == "scan":
            count = count_of(expert, ids_P, num_pairs, TILE)
            for start in range(0, count, ROWS):
                found = rows_at(
                    *(start, count, expert, ids_P, order_P, num_pairs),
                    *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
                )
                down_rows(
                    hidden_RF,
                    *of_rows,
                    *(expert, column, 0, found),
                    tl.load(weights_P + found[0], mask=found[4], other=0.0),
                    *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
                )
        elif HALVES and end - first <= ROWS // 2:
            half = rows_at(
                *(first, end, expert, ids_P, order_P, num_pairs),
                *(ROWS_FROM, TOP_K, SHARED, ROWS // 2, TILE),
            )
            down_rows(
                half_RF,
                *of_rows,
                *(expert, column, first, half),
                tl.load(weights_P + half[0], mask=half[4], other=0.0),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
            )
        else:
            whole = rows_at(
                *(first, end, expert, ids_P, order_P, num_pairs),
                *(ROWS_FROM, TOP_K, SHARED, ROWS, TILE),
            )
            down_rows(
                hidden_RF,
                *of_rows,
                *(expert, column, first, whole),
                tl.load(weights_P + whole[0], mask=whole[4], other=0.0),
                *(BLOCK_N, BLOCK_K, STAGES, TMA, EVEN_K, COMPUTE, FORMAT),
            )
