"""Sums over ranks through their memory: two processes, whose memory is files that both map."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.errors import EngineDeadError
from octavo.parallel import ALONE, Meeting, PeerMemory, TorchCollectives
from tests.kernels.triton.interpreter import DEVICE
from tests.kernels.triton.peers import four_ranks, two_ranks
from tests.kernels.triton.peers.two_ranks import (
    COLUMNS,
    CPU,
    SIZE,
    UNGATED_ROWS,
    MappedRanks,
    all_sums,
)

import triton.language as tl  # isort: skip

from octavo.kernels.triton.peers import rows, sums  # isort: skip

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="benchmarks/peers.py is for GPUs")


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[MappedRanks]:
    meeting = Meeting("127.0.0.1", SIZE)
    command = [sys.executable, "-m", "tests.kernels.triton.peers.two_ranks"]
    with subprocess.Popen([*command, meeting.address, str(tmp_path)]) as other:
        try:  # whoever fails to meet it must not wait for its end
            found = MappedRanks(meeting, 0, tmp_path)
            yield found
            found.abort()
        finally:
            other.kill()


def test_sums_and_the_norm_after_them_are_those_made_one_after_the_other(
    ranks: MappedRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(sums, "UNGATED_ROWS", UNGATED_ROWS)
    for one in all_sums(ranks):
        for found, expected in zip(one.found, one.expected, strict=True):
            assert torch.equal(found, expected), one.name


@pytest.mark.slow
def test_four_ranks_push_few_rows_and_leave_many_to_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    for module, name in ((two_ranks, "NUM_BYTES"), (sums, "UNGATED_ROWS"), (sums, "PUSHED_BYTES")):
        monkeypatch.setattr(module, name, getattr(module, name))
    four_ranks.make_small()
    meeting = Meeting("127.0.0.1", four_ranks.SIZE)
    command = [sys.executable, "-m", "tests.kernels.triton.peers.four_ranks"]
    command += [meeting.address, str(tmp_path)]
    others = [subprocess.Popen([*command, str(rank)]) for rank in range(1, four_ranks.SIZE)]
    try:
        ranks = MappedRanks(meeting, 0, tmp_path)
        for one in four_ranks.all_sums(ranks):
            for found, expected in zip(one.found, one.expected, strict=True):
                assert torch.equal(found, expected), one.name
        ranks.abort()
    finally:
        for other in others:
            other.kill()
            other.wait()


class OneOfTwo(type(ALONE)):
    """A rank whose other one never comes."""

    size = SIZE

    def peer_memory(self, num_bytes: int, device: torch.device) -> PeerMemory:
        buffers = tuple(torch.zeros(1 << 13, dtype=torch.uint8) for _ in range(SIZE))
        return PeerMemory(buffers=buffers, stop=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("count", [2, 4])
def test_who_waits_for_a_rank_in_vain_gives_up_and_says_so(count: int) -> None:
    base = OneOfTwo()
    over = sums.PeerSums(base, base.peer_memory(0, CPU), COLUMNS, torch.float32)
    over.check()
    over.tries, over.ungated_rows = 20, 3
    over.all_reduce(torch.ones(count, COLUMNS))
    with pytest.raises(EngineDeadError, match="rank 0 of 2 waited in vain"):
        over.check()


def test_an_abort_ends_all_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "POLLS", tl.constexpr(4))
    monkeypatch.setattr(rows, "LOOKS", tl.constexpr(64))
    base = OneOfTwo()
    over = sums.PeerSums(base, base.peer_memory(0, CPU), COLUMNS, torch.float32)
    over.abort()
    over.ungated_rows = 1
    for count in (1, 3):  # looks at the flag long before it has tried often enough
        over.all_reduce(torch.ones(count, COLUMNS))
    monkeypatch.setattr(rows, "LOOKS", tl.constexpr(1 << 30))
    over.all_reduce(torch.ones(3, COLUMNS))  # told by those that have given up


def test_sums_are_the_librarys_where_the_check_at_start_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sums, "CHECK_TRIES", 20)
    monkeypatch.setattr(sums, "UNGATED_ROWS", UNGATED_ROWS)
    base = OneOfTwo()
    found = sums.over_peers(base, COLUMNS, torch.float32, CPU)
    assert found is base
    assert "the library's: another rank's part of a sum did not come" in caplog.text


def test_sums_are_the_librarys_where_no_memory_is_reached(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ranks = TorchCollectives(Meeting("127.0.0.1", 1), 0, CPU)
    found = sums.over_peers(ranks, COLUMNS, torch.float32, CPU)
    assert found is ranks
    assert "the library's: ranks on CPUs share no memory" in caplog.text
    ranks.abort()
