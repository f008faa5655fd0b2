"""Routing on the device: softmax and top-k in one kernel.

Called by `backend.py`, and within the product of a lone token (`norm_matvec.py`). Never looks at
weights or activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.weights import Router

ROUTE_ROWS = 4
"""Tokens of a program; fixed, so that a row's sum has one order whatever the batch."""


@triton.jit
def route_rows(
    first_row,
    logits_TE,
    weights_TK,
    ids_TK,
    counts_E,
    num_live,
    num_tokens,
    num_experts,
    first_held,
    num_held,
    row_stride,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """For the tokens first_row .. first_row + ROWS: p = softmax(logits); ids = the TOP_K largest p,
    of equal ones the lower id; weights = p[ids] (over their sum where RENORMALIZE). A NaN row takes
    experts 0, 1, ... with weight NaN.
    counts[e] += tokens that chose e. Ids count from first_held; those of others than the num_held
    experts from there on are -1, and with HAS_PADDING those of rows from num_live[0] on.

    logits_TE [T, E] any float; weights_TK float32 and ids_TK int32 [T, TOP_K]; counts_E integers.
    """
    row = first_row + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    is_row = row < num_tokens
    is_in = is_row[:, None] & (expert < num_experts)[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + expert[None, :]
    # Past the L1 cache: other programs of this launch may have stored them (`norm_route_kernel`).
    logits = tl.load(logits_TE + at, mask=is_in, other=-float("inf"), cache_modifier=".cg")
    logits = tl.where(is_row[:, None], logits.to(tl.float32), 0.0)
    raised = tl.exp(logits - tl.max(logits, 1)[:, None])
    p = raised / tl.sum(raised, 1)[:, None]
    # The bits of floats that are not negative sort like them, and integers are reduced in one
    # instruction: the latency of these reductions is most of what this kernel takes.
    left = tl.where(p == p, p.to(tl.int32, bitcast=True), -1)
    left = tl.where((expert < num_experts)[None, :], left, -3)
    slots = tl.arange(0, SLOTS)
    kept = tl.zeros([ROWS, SLOTS], tl.float32)
    ids = tl.zeros([ROWS, SLOTS], tl.int32)
    total = tl.zeros([ROWS], tl.float32)
    for slot in tl.static_range(TOP_K):
        best = tl.max(left, 1)
        chosen = tl.min(tl.where(left == best[:, None], expert[None, :], EXPERTS), 1)
        weight = tl.where(best >= 0, best.to(tl.float32, bitcast=True), float("nan"))
        left = tl.where(expert[None, :] == chosen[:, None], -2, left)
        kept = tl.where(slots[None, :] == slot, weight[:, None], kept)
        ids = tl.where(slots[None, :] == slot, chosen[:, None], ids)
        total += weight
    if RENORMALIZE:
        kept = kept / total[:, None]
    store_routes(
        *(row, kept, ids, weights_TK, ids_TK, counts_E, num_live, num_tokens, first_held, num_held),
        *(TOP_K, HAS_PADDING, ROWS, SLOTS),
    )


@triton.jit
def store_routes(
    row,
    weights,
    ids,
    weights_TK,
    ids_TK,
    counts_E,
    num_live,
    num_tokens,
    first_held,
    num_held,
    TOP_K: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Stores what ROWS tokens chose, [ROWS, SLOTS], and counts it; see `route_rows`."""
    slots = tl.arange(0, SLOTS)
    out = row.to(tl.int64)[:, None] * TOP_K + slots[None, :]
    is_out = (row < num_tokens)[:, None] & (slots < TOP_K)[None, :]
    is_live = is_out
    if HAS_PADDING:
        is_live = is_out & (row < tl.load(num_live))[:, None]
    tl.store(weights_TK + out, weights, mask=is_out)
    local = ids - first_held
    is_here = is_live & (local >= 0) & (local < num_held)
    tl.store(ids_TK + out, tl.where(is_here, local, -1), mask=is_out)
    # Integers: the order of the additions does not show.
    one = tl.full([ROWS, SLOTS], 1, counts_E.dtype.element_ty)
    tl.atomic_add(counts_E + ids, one, mask=is_live, sem="relaxed")


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def route_kernel(
    logits_TE,
    weights_TK,
    ids_TK,
    counts_E,
    num_live,
    num_tokens,
    num_experts,
    first_held,
    num_held,
    row_stride,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`route_rows` for ROWS tokens."""
    wait_turn(OVERLAP)
    announce(OVERLAP)
    route_rows(
        tl.program_id(0) * ROWS,
        *(logits_TE, weights_TK, ids_TK, counts_E, num_live, num_tokens, num_experts),
        *(first_held, num_held, row_stride),
        *(TOP_K, RENORMALIZE, HAS_PADDING, ROWS, EXPERTS, SLOTS),
    )


def route(
    logits_TE: Tensor, router: Router, counts_E: Tensor, num_live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns weights float32 [T, top_k] and ids int32 [T, top_k], best first; see `Ops.route`."""
    num_tokens, num_experts = logits_TE.shape
    top_k = router.rule.top_k
    assert 0 < top_k <= num_experts, (top_k, num_experts)
    assert logits_TE.stride(1) == 1 or num_experts == 1
    assert counts_E.is_contiguous()
    assert len(counts_E) >= num_experts
    weights = logits_TE.new_empty((num_tokens, top_k), dtype=torch.float32)
    ids = logits_TE.new_empty((num_tokens, top_k), dtype=torch.int32)
    if num_tokens:
        route_kernel[(cdiv(num_tokens, ROUTE_ROWS),)](
            logits_TE,
            weights,
            ids,
            counts_E,
            ids if num_live is None else num_live,
            num_tokens,
            num_experts,
            *router.held_of(num_experts),
            logits_TE.stride(0),
            TOP_K=top_k,
            RENORMALIZE=router.rule.renormalize,
            HAS_PADDING=num_live is not None,
            ROWS=ROUTE_ROWS,
            EXPERTS=next_power_of_2(num_experts),
            SLOTS=next_power_of_2(top_k),
            num_warps=4,
            **launch_options(logits_TE.device),
        )
    return weights, ids
