"""What several programs have of one sum, added by the last of them.

Called by kernels of packed weights, whose columns are shared out where rows alone would be too few
programs. Never adds floats atomically: parts are added in rising order, whoever is last.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def stores_layout(rows: int, warps: int) -> gl.BlockedLayout:
    """Of results [rows, tokens]: rows lie side by side in memory."""
    along = min(32, rows // 8)
    return gl.BlockedLayout([8, 1], [along, 32 // along], [1, warps], [0, 1])


@gluon.jit
def is_last_of(ticket, COUNT: gl.constexpr):
    """Whether the other COUNT - 1 programs have been here: what they stored can be loaded, past the
    L1 cache."""
    gl.thread_barrier()  # All threads have stored before one of them tells so.
    is_last = gl.atomic_add(ticket, 1, sem="acq_rel") == COUNT - 1
    if is_last:
        gl.store(ticket, 0)
    return is_last


@gluon.jit
def sum_of_splits(total, sums, at, step, is_some, ticket, SPLITS: gl.constexpr):
    """Returns the sum of the parts of all SPLITS programs 1, and whether this one is the last and
    so has it. total: its own part; sums: float32, where parts lie `step` apart, each `at`."""
    is_last = True
    if SPLITS > 1:
        gl.store(sums + (at + gl.program_id(1) * step), total, mask=is_some)
        is_last = is_last_of(ticket, SPLITS)
        if is_last:
            whole = gl.zeros_like(total)
            for split in gl.static_range(SPLITS):
                part = sums + (at + split * step)
                whole += gl.load(part, mask=is_some, other=0.0, cache_modifier=".cg")
            total = whole
    return total, is_last


@gluon.jit
def store_product(
    total, out_TN, bias_N, scales_N, sums_STN, tickets, first_row, first_token, num_rows,
    num_tokens, out_stride, SPLITS: gl.constexpr, HAS_SCALES: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Writes total [rows, tokens], the part of program 1 of a product's sums, to out_TN, which has
    a row stride: the last program of a tile does, with all parts (`sum_of_splits`), times the
    scales of rows, and with their bias."""
    ROWS: gl.constexpr = total.shape[0]
    out: gl.constexpr = stores_layout(ROWS, gl.num_warps())
    total = gl.convert_layout(total, out)
    token = first_token + gl.arange(0, total.shape[1], gl.SliceLayout(0, out))
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, out))
    is_token = (token < num_tokens)[None, :]
    at = token.to(gl.int64)[None, :] * num_rows + row[:, None]
    step = num_tokens.to(gl.int64) * num_rows
    ticket = tickets + gl.program_id(0)
    total, is_last = sum_of_splits(total, sums_STN, at, step, is_token, ticket, SPLITS)
    if is_last:
        if HAS_SCALES:
            total *= gl.load(scales_N + row)[:, None]
        if HAS_BIAS:
            total += gl.load(bias_N + row).to(gl.float32)[:, None]
        to = out_TN + token.to(gl.int64)[None, :] * out_stride + row[:, None]
        gl.store(to, total.to(out_TN.dtype.element_ty), mask=is_token)
