"""Routing by any `RoutingRule`: other scores than softmax, corrections, groups, scales.

Called by `ops.py`; what `route.py` serves is faster there. Never looks at weights or activations.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.triton.experts.route import ROUTE_ROWS, store_routes
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import announce, launch_options, wait_turn
from octavo.kernels.weights import Router

NAN_KEY = tl.constexpr(-0x7FFFFFFD)
"""Sort keys below that of -inf."""
TAKEN_KEY = tl.constexpr(-0x7FFFFFFE)
NOBODY_KEY = tl.constexpr(-0x7FFFFFFF)


@triton.jit
def sort_key(x):
    """Returns int32 that sort like the float32 x: they are reduced in one instruction."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x == x, key, NAN_KEY)


@triton.jit
def first_best(keys, places, AXIS: tl.constexpr, NONE: tl.constexpr):
    """Returns the place of the largest key along an axis, the lowest of equal ones."""
    is_best = keys == tl.expand_dims(tl.max(keys, AXIS), AXIS)
    return tl.min(tl.where(is_best, places, NONE), AXIS)


@triton.jit
def scored(logits, is_expert, SCORE: tl.constexpr):
    """Returns the scores of the experts; `logits` are 0 elsewhere."""
    # One way out: the compiler looks at what stands behind a return, too.
    if SCORE == "softmax":
        highest = tl.max(tl.where(is_expert, logits, -float("inf")), 1)
        raised = tl.where(is_expert, tl.exp(logits - highest[:, None]), 0.0)
        scores = raised / tl.sum(raised, 1)[:, None]
    elif SCORE == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    elif SCORE == "sqrt_softplus":
        raised = tl.exp(tl.minimum(logits, 20.0))
        more = 1.0 + raised
        # log(1 + r): what the addition loses is made good, and above 20 it is the logit.
        small = tl.where(more == 1.0, 1.0, more - 1.0)
        plus = tl.where(more == 1.0, raised, tl.log(more) * (raised / small))
        scores = tl.sqrt(tl.where(logits > 20.0, logits, plus))
    else:
        tl.static_assert(SCORE == "logit")
        scores = logits
    return scores


@triton.jit
def keys_of_best_groups(
    choice,
    keys,
    group_of_lane,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Returns the keys, NOBODY_KEY outside the TOP_GROUPS best groups. choice: [ROWS, lanes]."""
    within = tl.arange(0, SIZE)[None, None, :]
    split = tl.reshape(choice, [ROWS, GROUP_LANES, SIZE])
    best = tl.max(split, 2)
    if BEST_TWO:
        first = first_best(split, within, 2, SIZE)
        best += tl.max(tl.where(within == first[:, :, None], -float("inf"), split), 2)
    group = tl.arange(0, GROUP_LANES)[None, :]
    left = tl.where(group < GROUPS, sort_key(best), NOBODY_KEY)
    is_kept = tl.zeros([ROWS, GROUP_LANES], tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        chosen = first_best(left, group, 1, GROUP_LANES)[:, None]
        is_kept = tl.where(group == chosen, 1, is_kept)
        left = tl.where(group == chosen, TAKEN_KEY, left)
    spread = tl.broadcast_to(is_kept[:, :, None], [ROWS, GROUP_LANES, SIZE])
    is_in = tl.reshape(spread, [ROWS, GROUP_LANES * SIZE]) == 1
    return tl.where(is_in, keys, NOBODY_KEY)


@triton.jit
def weighed(
    chosen,
    is_slot,
    sum_epsilon,
    least_sum,
    WEIGHTING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    """Returns the weights [ROWS, SLOTS] of chosen scores, or of chosen logits."""
    if WEIGHTING == "softmax":
        highest = tl.max(tl.where(is_slot, chosen, -float("inf")), 1)
        chosen = tl.where(is_slot, tl.exp(chosen - highest[:, None]), 0.0)
        chosen = chosen / tl.sum(chosen, 1)[:, None]
    elif WEIGHTING == "sigmoid":
        chosen = 1.0 / (1.0 + tl.exp(-chosen))
    if RENORMALIZE:
        total = tl.sum(tl.where(is_slot, chosen, 0.0), 1) + sum_epsilon
        # A NaN stays one, which a maximum would not promise.
        total = tl.where(total < least_sum, least_sum, total)
        chosen = chosen / total[:, None]
    return chosen


@launchable
@triton.jit(do_not_specialize=["num_tokens"])
def route_by_rule_kernel(
    logits_TE,
    correction_E,
    scale_E,
    weights_TK,
    ids_TK,
    counts_E,
    num_live,
    num_tokens,
    group_size,
    first_held,
    num_held,
    row_stride,
    sum_epsilon,
    least_sum,
    scale,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    WEIGHTING: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    BEST_TWO: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_CORRECTION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_LANES: tl.constexpr,
    SIZE: tl.constexpr,
    SLOTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`RoutingRule` for ROWS tokens. Each group of `group_size` experts has SIZE lanes.

    logits_TE [T, E] any float, rows strided; correction_E, scale_E float32; weights_TK float32 and
    ids_TK int32 [T, TOP_K]; counts_E integers. HAS_PADDING, first_held and num_held: see
    `route_rows`.
    """
    wait_turn(OVERLAP)
    announce(OVERLAP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, GROUP_LANES * SIZE)
    group = lane // SIZE
    expert = group * group_size + lane % SIZE
    is_expert = (lane % SIZE < group_size) & (group < GROUPS)
    is_in = (row < num_tokens)[:, None] & is_expert[None, :]
    at = row.to(tl.int64)[:, None] * row_stride + expert[None, :]
    logits = tl.load(logits_TE + at, mask=is_in, other=0.0).to(tl.float32)
    scores = scored(logits, is_expert[None, :], SCORE)
    choice = scores
    if HAS_CORRECTION:
        choice += tl.load(correction_E + expert, mask=is_expert, other=0.0)[None, :]
    keys = tl.where(is_expert[None, :], sort_key(choice), NOBODY_KEY)
    if GROUPS > 1:
        known = tl.where(is_expert[None, :] & (choice == choice), choice, -float("inf"))
        keys = keys_of_best_groups(
            *(known, keys, group, ROWS, GROUPS, TOP_GROUPS, BEST_TWO, GROUP_LANES, SIZE)
        )
    source = scores if WEIGHTING == "score" else logits
    slots = tl.arange(0, SLOTS)[None, :]
    chosen = tl.zeros([ROWS, SLOTS], tl.float32)
    ids = tl.zeros([ROWS, SLOTS], tl.int32)
    for slot in tl.static_range(TOP_K):
        best = first_best(keys, lane[None, :], 1, GROUP_LANES * SIZE)[:, None]
        value = tl.sum(tl.where(lane[None, :] == best, source, 0.0), 1)
        chosen = tl.where(slots == slot, value[:, None], chosen)
        ids = tl.where(slots == slot, best // SIZE * group_size + best % SIZE, ids)
        keys = tl.where(lane[None, :] == best, TAKEN_KEY, keys)
    is_slot = slots < TOP_K
    weights = weighed(chosen, is_slot, sum_epsilon, least_sum, WEIGHTING, RENORMALIZE) * scale
    if HAS_SCALES:
        weights *= tl.load(scale_E + ids, mask=is_slot, other=0.0)
    store_routes(
        *(row, weights, ids, weights_TK, ids_TK, counts_E, num_live, num_tokens),
        *(first_held, num_held),
        *(TOP_K, HAS_PADDING, ROWS, SLOTS),
    )


def route_by_rule(
    logits_TE: Tensor, router: Router, counts_E: Tensor, num_live: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns weights float32 [T, top_k] and ids int32 [T, top_k]; see `Ops.route`."""
    rule = router.rule
    num_tokens, num_experts = logits_TE.shape
    group_size = num_experts // rule.num_groups
    assert group_size * rule.num_groups == num_experts
    assert 0 < rule.top_k <= group_size * rule.top_groups, (rule.top_k, num_experts)
    assert logits_TE.stride(1) == 1 or num_experts == 1
    assert counts_E.is_contiguous()
    assert len(counts_E) >= num_experts
    for tensor in (router.correction_E, router.scale_E):
        assert tensor is None or (tensor.shape == (num_experts,) and tensor.is_contiguous())
    weights = logits_TE.new_empty((num_tokens, rule.top_k), dtype=torch.float32)
    ids = logits_TE.new_empty((num_tokens, rule.top_k), dtype=torch.int32)
    if num_tokens:
        route_by_rule_kernel[(cdiv(num_tokens, ROUTE_ROWS),)](
            logits_TE,
            weights if router.correction_E is None else router.correction_E,
            weights if router.scale_E is None else router.scale_E,
            weights,
            ids,
            counts_E,
            ids if num_live is None else num_live,
            num_tokens,
            group_size,
            *router.held_of(num_experts),
            logits_TE.stride(0),
            rule.sum_epsilon,
            rule.least_sum,
            rule.scale,
            TOP_K=rule.top_k,
            SCORE=rule.score,
            WEIGHTING=rule.weighting,
            GROUPS=rule.num_groups,
            TOP_GROUPS=rule.top_groups,
            BEST_TWO=rule.group_score == "best_two",
            RENORMALIZE=rule.renormalize,
            HAS_CORRECTION=router.correction_E is not None,
            HAS_SCALES=router.scale_E is not None,
            HAS_PADDING=num_live is not None,
            ROWS=ROUTE_ROWS,
            GROUP_LANES=next_power_of_2(rule.num_groups),
            SIZE=next_power_of_2(group_size),
            SLOTS=next_power_of_2(rule.top_k),
            num_warps=4,
            **launch_options(logits_TE.device),
        )
    return weights, ids
