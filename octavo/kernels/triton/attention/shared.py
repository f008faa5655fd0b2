"""Attention of decoding sequences that share leading blocks: each shared block is read once.

The plan (NumPy, once a step) groups sequences by equal leading columns of their block tables; the
kernel stacks the group's queries into one matrix product over the shared part, the split kernel
does the private tails, and log-sum-exp merges both. Sequences outside any group decode as ever.
The bits of a row then depend on who shares with it: a deterministic engine leaves the plan out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from octavo.kernels.facts import SHARED_SPLITS, split_partials
from octavo.kernels.inputs import AttentionBatch, AttentionOp, KVLayer
from octavo.kernels.triton.attention.choose import attended, fits_hopper, hopper, tiles_attention
from octavo.kernels.triton.attention.decode import decode_attention
from octavo.kernels.triton.attention.device_plan import SharedPrefix, plan_of
from octavo.kernels.triton.attention.groups import shared_groups
from octavo.kernels.triton.attention.partials import Partials, make_partials
from octavo.kernels.triton.attention.planes import planes_of
from octavo.kernels.triton.attention.scores import scores_of
from octavo.kernels.triton.attention.splits import SPLIT_STEP, Tiling, split_size
from octavo.kernels.triton.attention.tiles import attend_range
from octavo.kernels.triton.launching.chip import cdiv, next_power_of_2
from octavo.kernels.triton.launching.launchable import launchable
from octavo.kernels.triton.launching.overlap import launch_options, wait_turn
from octavo.kernels.triton.tiles.kv import both_planes

MIN_BLOCKS = 64
"""Fewer shared blocks than this come from the L2 cache anyway, and merging costs time."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedPrefixPlan:
    """Groups of sequences and what they share, on the host."""

    members: np.ndarray
    """int32: sequence indices, group after group."""
    group_starts: np.ndarray
    """int32 [groups + 1]: where each group's members begin."""
    shared_tokens: np.ndarray
    """int32 [S]: tokens of each sequence that its group reads for it; 0 outside groups."""
    split_sizes: np.ndarray
    """int32 [groups]."""
    piece_starts: np.ndarray
    """int32 [groups + 1]: where each group's pieces of work begin, heads not counted."""
    max_members: int
    max_splits: int
    max_tail: int
    """Tokens of the longest private tail, or of the longest sequence outside groups."""

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What a device needs of it, int32, in the order that `on_device` takes."""
        partials = np.zeros_like(self.shared_tokens)
        for group, size in enumerate(self.split_sizes):
            own = self.members[self.group_starts[group] : self.group_starts[group + 1]]
            partials[own] = -(-self.shared_tokens[own] // size)
        groups = self.group_starts, self.shared_tokens, partials, self.split_sizes
        return self.members, *groups, self.piece_starts

    def on_device(self, tensors: Sequence[Tensor]) -> SharedPrefix:
        """Returns the plan over the tensors that `arrays` have become."""
        members, group_starts, shared_tokens_S, shared_partials_S, *rest = tensors
        split_sizes, piece_starts = rest
        return SharedPrefix(
            members=members,
            group_starts=group_starts,
            shared_tokens_S=shared_tokens_S,
            shared_partials_S=shared_partials_S,
            split_sizes=split_sizes,
            piece_starts=piece_starts,
            num_groups=len(split_sizes),
            max_members=self.max_members,
            max_splits=self.max_splits,
            max_tail=self.max_tail,
        )

    def to_device(self, device: torch.device) -> SharedPrefix:
        """Returns the plan as tensors on `device`."""
        return self.on_device([torch.from_numpy(part).to(device) for part in self.arrays])

    def grown(self, seq_lens: np.ndarray, query_lens: np.ndarray) -> SharedPrefixPlan:
        """Returns the plan of the same sequences after some steps, which share what they shared."""
        max_tail = _max_tail(seq_lens, query_lens, self.shared_tokens)
        return replace(self, max_tail=max_tail)

    def padded(self, num_sequences: int) -> SharedPrefixPlan:
        """Returns a plan of the same groups with room for `num_sequences`, and bounds that many
        plans share, so that one captured graph serves them all."""
        num_groups = next_power_of_2(len(self.split_sizes))
        return SharedPrefixPlan(
            members=_padded(self.members, num_sequences),
            group_starts=_padded(self.group_starts, num_groups + 1, len(self.members)),
            shared_tokens=_padded(self.shared_tokens, num_sequences),
            split_sizes=_padded(self.split_sizes, num_groups, 1),
            piece_starts=_padded(self.piece_starts, num_groups + 1, int(self.piece_starts[-1])),
            max_members=num_sequences,
            max_splits=next_power_of_2(self.max_splits),
            max_tail=max(256, next_power_of_2(self.max_tail)),
        )

    @property
    def bounds(self) -> tuple[int, ...]:
        """What the launches of a captured graph depend on."""
        return len(self.split_sizes), self.max_members, self.max_splits, self.max_tail

    @property
    def max_partials(self) -> int:
        """Partial results of a row at most, when padded."""
        tail = max(256, next_power_of_2(self.max_tail))
        return next_power_of_2(self.max_splits) + split_partials(tail)


def plan_shared_prefix(
    block_table: np.ndarray,
    seq_lens: np.ndarray,
    query_lens: np.ndarray,
    tiles: Tiling,
    *,
    block_size: int = 16,
    min_blocks: int = MIN_BLOCKS,
) -> SharedPrefixPlan | None:
    """Returns the groups whose reads save most, or None where none saves `min_blocks` a member.
    `tiles` says how many pieces the layers' kernel makes of them.

    Every sequence with one query counts, by its full blocks alone. Of nested prefixes (a tree) the
    level with the fewest blocks read is taken, for every subtree on its own.
    """
    full = np.where(query_lens == 1, seq_lens // block_size, 0)
    chosen = shared_groups(block_table, full, min_blocks)
    if not chosen:
        return None
    shared = np.zeros(len(full), np.int32)
    for members, blocks in chosen:
        shared[members] = blocks * block_size
    work = tuple((blocks * block_size, len(members)) for members, blocks in chosen)
    size = split_size(work, tiles, most=SHARED_SPLITS, shortest=SPLIT_STEP)
    pieces = [cdiv(count, tiles.queries) * cdiv(tokens, size) for tokens, count in work]
    starts = np.cumsum([0, *(len(members) for members, _ in chosen)])
    return SharedPrefixPlan(
        members=np.array([s for members, _ in chosen for s in members], np.int32),
        group_starts=starts.astype(np.int32),
        shared_tokens=shared,
        split_sizes=np.full(len(chosen), size, np.int32),
        piece_starts=np.cumsum([0, *pieces]).astype(np.int32),
        max_members=max(len(members) for members, _ in chosen),
        max_splits=max(cdiv(tokens, size) for tokens, _ in work),
        max_tail=_max_tail(seq_lens, query_lens, shared),
    )


def _max_tail(seq_lens: np.ndarray, query_lens: np.ndarray, shared: np.ndarray) -> int:
    return max(1, int((seq_lens - shared)[query_lens == 1].max()))


def _padded(array: np.ndarray, size: int, value: int = 0) -> np.ndarray:
    """Returns the array with `value` behind it. np.pad takes some 15 us for that."""
    padded = np.full(size, value, array.dtype)
    padded[: len(array)] = array
    return padded


@launchable
@triton.jit(do_not_specialize=["num_partials", "num_tiles"])
def _shared_kernel(
    q,
    key,
    key_scale,
    stride_key,
    stride_key_scale,
    value,
    value_scale,
    stride_value,
    stride_value_scale,
    partial_out,
    partial_lse,
    query_starts,
    seq_lens,
    block_table,
    members,
    group_starts,
    shared_tokens,
    split_sizes,
    num_partials,
    num_tiles,
    stride_table,
    scale_log2,
    cap_log2,
    reach,
    H: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    DELTA: tl.constexpr,
    VISIBLE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One split of what a group shares, for BLOCK_M // PADDED_GROUP of its members at once.

    partial_out[s, h, split] = softmax(scale q k^T) v over the split, partial_lse its log2-sum-exp2.
    Program 0: split; 1: group * num_tiles + tile of members; 2: kv head. Row r is member
    r // PADDED_GROUP, head r % PADDED_GROUP; every shared key is visible to every member, but for
    windows and chunks. q [T, H, D]; key, value [B, P, K, D]; partial_out [S, H, partials, D].
    """
    GROUP: tl.constexpr = H // K
    MEMBERS: tl.constexpr = BLOCK_M // PADDED_GROUP
    wait_turn(OVERLAP)
    group = tl.program_id(1) // num_tiles
    first = tl.load(group_starts + group)
    count = tl.load(group_starts + group + 1) - first
    first_member = (tl.program_id(1) % num_tiles) * MEMBERS
    if first_member >= count:
        return
    leader = tl.load(members + first).to(tl.int64)
    shared = tl.load(shared_tokens + leader)
    size = tl.load(split_sizes + group)
    start = tl.program_id(0) * size
    if start >= shared:
        return
    end = tl.minimum(start + size, shared)
    kv_head = tl.program_id(2)
    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    member = first_member + rows // PADDED_GROUP
    live = (member < count) & (rows % PADDED_GROUP < GROUP)
    sequence = tl.load(members + first + member, mask=live, other=0)
    t = tl.load(query_starts + sequence, mask=live, other=0).to(tl.int64)
    # Rows that stand for nobody stay within the group's visible part: no NaN, nothing stored.
    position = tl.load(seq_lens + sequence, mask=live, other=2**30) - 1
    heads = t * H + kv_head * GROUP + rows % PADDED_GROUP
    mask = live[:, None] & (offs_d < D)[None, :]
    q_tile = tl.load(q + heads[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    keys, values = both_planes(
        *(key, key_scale, stride_key, stride_key_scale),
        *(value, value_scale, stride_value, stride_value_scale, KEY, VALUE),
    )
    mean, lse = attend_range(
        q_tile, position, kv_head, keys, values,
        block_table + leader * stride_table, start, end // BLOCK_N * BLOCK_N, end,
        scale_log2, cap_log2, reach,
        KEY, VALUE, K, D, P, DELTA, VISIBLE, HAS_CAP, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    owner = sequence.to(tl.int64) * H + kv_head * GROUP + rows % PADDED_GROUP
    place = owner * num_partials + tl.program_id(0)
    to = partial_out + place[:, None] * D + offs_d[None, :]
    tl.store(to, mean, mask=mask)
    tl.store(partial_lse + place, lse, mask=live)


def shared_shape(
    rows: int, head_size: int, dtype: torch.dtype, *, is_plain: bool = True
) -> tuple[int, int, int, int]:
    """Returns (BLOCK_M, BLOCK_N, num_warps, num_stages) for up to `rows` stacked query rows, over
    keys and values that are plain numbers or not."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if not is_plain:
        return (128 if head_size <= 128 else 64), 64, 8, 2
    if head_size > 128:
        return 64, 64, 4, 2
    return (128, 64, 4, 3) if rows > 64 else (64, 64, 4, 3)


def shared_prefix_attention(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    plan: SharedPrefix,
    tickets: Tensor | None = None,
) -> Tensor:
    """Returns what `attention` returns, [T, H * D], reading the plan's shared blocks once.

    `plan` must be of this very batch. Sequences with several queries are not grouped.
    """
    out = torch.empty_like(q_THD)
    most = plan.max_splits + split_partials(plan.max_tail)
    partials = make_partials(q_THD, most, None, len(batch.seq_lens_S) * most)
    _attend_shared(q_THD, op, layer, batch, plan, partials)
    is_own = decode_attention(
        *(q_THD, op, layer, batch, out),
        max_seq_len=plan.max_tail,
        shared=(plan.shared_tokens_S, plan.shared_partials_S),
        partials=partials,
        tickets=tickets,
        unmixes=plan_of(batch).max_query_len == 1,
    )
    is_own |= tiles_attention(q_THD, op, layer, batch, out)
    return out.flatten(1) if is_own else attended(out, layer)


def _attend_shared(
    q_THD: Tensor,
    op: AttentionOp,
    layer: KVLayer,
    batch: AttentionBatch,
    plan: SharedPrefix,
    partials: Partials,
) -> None:
    if fits_hopper(q_THD, op, layer):
        hopper.shared_prefixes(q_THD, op, layer, batch, plan, partials)
        return
    planes = planes_of(q_THD, layer, batch)
    num_heads, head_size = q_THD.shape[1:]
    num_kv_heads, dtype = planes.num_heads, planes.dtype
    padded_group = next_power_of_2(num_heads // num_kv_heads)
    rows = plan.max_members * padded_group
    block_m, block_n, num_warps, num_stages = shared_shape(
        rows, head_size, dtype, is_plain=planes.is_plain
    )
    block_m = max(block_m, padded_group)
    tiles = next_power_of_2(cdiv(rows, block_m))
    scores = scores_of(op, batch.seq_lens_S)
    _shared_kernel[(plan.max_splits, plan.num_groups * tiles, num_kv_heads)](
        q_THD.to(dtype),
        *planes.arguments,
        partials.out,
        partials.lse,
        batch.query_starts,
        batch.seq_lens_S,
        batch.block_table,
        plan.members,
        plan.group_starts,
        plan.shared_tokens_S,
        plan.split_sizes,
        partials.num_partials,
        tiles,
        batch.block_table.stride(0),
        *(scores.scale_log2, scores.cap_log2, scores.reach),
        H=num_heads,
        **planes.constants,
        DELTA=planes.value_delta,
        VISIBLE=scores.visible,
        HAS_CAP=scores.has_cap,
        PADDED_GROUP=padded_group,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=max(16, next_power_of_2(head_size)),
        num_warps=num_warps,
        num_stages=num_stages,
        **launch_options(q_THD.device),
    )
