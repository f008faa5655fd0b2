"""Collectives: every rank gets the same sums, and nobody waits for one that is gone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

from octavo.errors import EngineDeadError
from octavo.parallel import ALONE, Collectives, Meeting, TorchCollectives

Result = TypeVar("Result")
CPU = torch.device("cpu")


def on_ranks(size: int, body: Callable[[TorchCollectives], Result]) -> list[Future[Result]]:
    """Runs `body` once for each rank, in threads: nothing is kept for a whole process."""

    keeper = Meeting("127.0.0.1", size)

    def run(rank: int) -> Result:
        meeting = Meeting.at(keeper.address, size) if rank else keeper
        collectives = TorchCollectives(meeting, rank, CPU)
        try:
            return body(collectives)
        finally:
            collectives.abort()

    with ThreadPoolExecutor(size) as pool:
        return [pool.submit(run, rank) for rank in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_has_the_same_bits_on_all_ranks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 7, 33).to(dtype)
    found = on_ranks(3, lambda ranks: ranks.all_reduce(parts[ranks.rank].clone()))
    first, *others = [one.result() for one in found]
    assert first.dtype == dtype
    assert all(torch.equal(first, other) for other in others)
    torch.testing.assert_close(first, parts.float().sum(0).to(dtype))


def test_columns_are_gathered_in_rank_order() -> None:
    whole = torch.arange(24.0).view(4, 6)
    found = on_ranks(3, lambda ranks: ranks.all_gather_columns(whole.chunk(3, dim=1)[ranks.rank]))
    for one in found:
        assert one.result().is_contiguous()
        assert torch.equal(one.result(), whole)


def test_the_least_of_all_ranks_is_known_to_each() -> None:
    found = on_ranks(2, lambda ranks: ranks.least([10 + ranks.rank, 5 - ranks.rank, 7]))
    assert [one.result() for one in found] == [[10, 4, 7]] * 2


def test_nobody_waits_for_a_rank_that_is_gone() -> None:
    def body(ranks: TorchCollectives) -> None:
        if ranks.rank == 0:
            ranks.all_reduce(torch.zeros(5))

    waiting, gone = on_ranks(2, body)
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


def test_who_does_not_come_to_the_meeting_is_named() -> None:
    meeting = Meeting("127.0.0.1", 3)
    wanted = rf"rank 1, 2 of 3 did not come to {meeting.address} within 0\.1 s"
    with pytest.raises(EngineDeadError, match=wanted):
        meeting.await_all(0, 0.1)
