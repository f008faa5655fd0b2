"""Collectives: every rank gets the same sums, and nobody waits for one that is gone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from octavo.parallel import ALONE, Collectives, TorchCollectives

Result = TypeVar("Result")
CPU = torch.device("cpu")


def on_ranks(
    folder: Path, size: int, body: Callable[[TorchCollectives], Result]
) -> list[Future[Result]]:
    """Runs `body` once for each rank, in threads: nothing is kept for a whole process."""

    def run(rank: int) -> Result:
        collectives = TorchCollectives(folder, rank, size, CPU)
        try:
            return body(collectives)
        finally:
            collectives.abort()

    with ThreadPoolExecutor(size) as pool:
        return [pool.submit(run, rank) for rank in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_has_the_same_bits_on_all_ranks(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 7, 33).to(dtype)
    found = on_ranks(tmp_path, 3, lambda ranks: ranks.all_reduce(parts[ranks.rank].clone()))
    first, *others = [one.result() for one in found]
    assert first.dtype == dtype
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, parts.float().sum(0).to(dtype))


def test_columns_are_gathered_in_rank_order(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    found = on_ranks(
        tmp_path, 3, lambda ranks: ranks.all_gather_columns(whole.chunk(3, dim=1)[ranks.rank])
    )
    for one in found:
        assert one.result().is_contiguous()
        assert torch.equal(one.result(), whole)


def test_the_least_of_all_ranks_is_known_to_each(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 2, lambda ranks: ranks.least([10 + ranks.rank, 5 - ranks.rank, 7]))
    assert [one.result() for one in found] == [[10, 4, 7]] * 2


def test_nobody_waits_for_a_rank_that_is_gone(tmp_path: Path) -> None:
    def body(ranks: TorchCollectives) -> None:
        if ranks.rank == 0:
            ranks.all_reduce(torch.zeros(5))

    waiting, gone = on_ranks(tmp_path, 2, body)
    gone.result()
    with pytest.raises(RuntimeError):
        waiting.result()


def test_one_rank_alone_has_nothing_to_do() -> None:
    alone: Collectives = ALONE
    x = torch.ones(3)
    assert alone.all_reduce(x) is x
    assert alone.all_gather_columns(x) is x
    assert alone.least([3, 4]) == [3, 4]
    alone.abort()
