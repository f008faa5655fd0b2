"""Pairs sorted by expert, against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.triton.cases import routed

from octavo.kernels.triton.experts import sort  # isort: skip


@pytest.mark.parametrize(
    ("tokens", "count", "top_k"), [(1, 1, 1), (5, 3, 2), (64, 60, 4), (300, 5, 3), (40, 130, 8)]
)
def test_pairs_are_sorted_by_expert_into_blocks(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tokens: int, count: int, top_k: int
) -> None:
    _, ids = routed(rng, tokens, count, top_k)
    ids[0, 0], ids[-1, -1] = -1, 10**6
    for max_chunks, uncounted in ((3, 0), (3, 1024), (128, 1024)):
        monkeypatch.setattr(sort, "MAX_CHUNKS", max_chunks)
        monkeypatch.setattr(sort, "UNCOUNTED_PAIRS", uncounted)
        assert_sorted(sort.sort_pairs(ids, count, 16), ids, count)


def assert_sorted(pairs: sort.SortedPairs, ids: Tensor, count: int) -> None:
    chosen = ids.flatten().cpu()
    is_known = (chosen >= 0) & (chosen < count)
    expected = torch.argsort(chosen.masked_fill(~is_known, count), stable=True)
    kept = int(is_known.sum())
    assert torch.equal(pairs.order_P[:kept].cpu().long(), expected[:kept])
    expert, first, end = pairs.blocks_3B.cpu()
    used = int((expert >= 0).sum())
    assert (expert[used:] == -1).all()
    assert (end[used:] == used).all()
    covered = 0
    for e, a, b in zip(expert.tolist(), first.tolist(), end.tolist(), strict=True):
        if e < 0:
            continue
        assert a == covered
        assert 0 < b - a <= 16
        assert (chosen[expected[a:b]] == e).all()
        covered = b
    assert covered == kept
