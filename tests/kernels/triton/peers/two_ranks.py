"""Two ranks whose memory is files that both have mapped; run by test_sums.py.

`python -m tests.kernels.triton.peers.two_ranks ADDRESS FOLDER` is rank 1: it makes the same sums
in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor

from octavo.kernels.inputs import HeldParts
from octavo.kernels.triton.peers import sums
from octavo.parallel import Meeting, PeerMemory, TorchCollectives
from tests.kernels.triton import interpreter  # noqa: F401
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.small.norm import rms_norm  # isort: skip

SIZE = 2
NUM_BYTES = 1 << 11
CPU = torch.device("cpu")
COLUMNS, EPS = 40, 1e-5
UNGATED_ROWS = 2
"""So that few rows are many for the kernel."""


class MappedRanks(TorchCollectives):
    """Ranks on the CPU that reach each other's memory."""

    def __init__(self, meeting: Meeting, rank: int, folder: Path) -> None:
        super().__init__(meeting, rank, CPU)
        self._folder = folder
        self.memory: PeerMemory | None = None

    def peer_memory(self, num_bytes: int, device: torch.device) -> PeerMemory:
        number = len(self._peers)
        for rank in range(self.size):
            path = self._folder / f"{number}-{rank}"
            with path.open("ab") as file:
                file.truncate(NUM_BYTES)
        buffers = [
            torch.from_file(
                str(self._folder / f"{number}-{rank}"), shared=True, size=NUM_BYTES,
                dtype=torch.uint8,
            )
            for rank in range(self.size)
        ]  # fmt: skip
        self.memory = PeerMemory(buffers=tuple(buffers), stop=torch.zeros(1, dtype=torch.int32))
        self._peers.append(self.memory)
        self.least([0])
        return self.memory


def parts_of(case: int, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields what each rank adds: the same numbers in both processes. Every format holds their
    sums; the interpreter cuts off what must be rounded."""
    generator = torch.Generator().manual_seed(case)
    for _ in range(SIZE):
        part = torch.randint(-8, 9, shape, generator=generator).to(dtype)
        part.view(-1)[::5] = -0.0  # which stands for nothing in the ranks' memory
        yield part


def ids_of(case: int, count: int, num_held: int) -> Iterator[Tensor]:
    """Yields which of the first parts each rank has, some of them on one rank only."""
    generator = torch.Generator().manual_seed(100 + case)
    ids = torch.randint(0, 2 * SIZE, (count, num_held), generator=generator)
    for rank in range(SIZE):
        yield torch.where(ids % SIZE == rank, ids // SIZE, -1).to(torch.int32)


class Sum(NamedTuple):
    name: str
    found: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def all_sums(ranks: MappedRanks) -> Iterator[Sum]:
    """Makes the same sums on whichever rank it is."""
    for dtype in (torch.bfloat16, torch.float32):
        over = sums.over_peers(ranks, COLUMNS, dtype, CPU)
        assert isinstance(over, sums.PeerSums), "the check at start has failed"
        few, most = over.ungated_rows, over.max_rows
        for case, count in enumerate((1, few, few + 1, most + 3, 2)):
            weight = torch.linspace(0.5, 2, COLUMNS)
            for num_parts, num_held in ((0, 0), (2, 0), (3, 2)):
                shape = (count, num_parts, COLUMNS) if num_parts else (count, COLUMNS)
                parts = [*parts_of(case, shape, dtype)]
                held = [*ids_of(case, count, num_held)]
                whole = [
                    added(part, ids) if num_parts else part
                    for part, ids in zip(parts, held, strict=True)
                ]
                expected = summed(torch.stack(whole, 1))
                found = () if num_parts else (over.all_reduce(parts[ranks.rank].clone()),)
                residual = torch.linspace(-1, 1, count * COLUMNS).view(count, COLUMNS).to(dtype)
                kept = residual.clone()
                normed = rms_norm(expected, kept, weight, EPS)
                own = parts[ranks.rank].clone(), residual, weight, EPS
                out = over.add_rms_norm(*own, held[ranks.rank] if num_held else None)
                assert out is not None
                yield Sum(
                    f"{dtype} {shape}, {num_held} held",
                    (*found, residual, out),
                    (*(expected for _ in found), kept, normed),
                )


def added(parts_TSM: Tensor, ids_TK: Tensor) -> Tensor:
    """Returns the parts added up, but for those of the first that are not here; those hold NaN from
    now on."""
    count = ids_TK.shape[1]
    parts_TSM[:, :count][ids_TK < 0] = torch.nan
    return HeldParts(rows_TSM=parts_TSM, ids_TK=ids_TK).added()


def summed(parts_TSM: Tensor) -> Tensor:
    return parts_TSM.float().sum(1).to(parts_TSM.dtype)


def main(address: str, folder: str) -> None:
    assert DEVICE == "cpu"
    torch.set_num_threads(1)
    sums.UNGATED_ROWS = UNGATED_ROWS
    ranks = MappedRanks(Meeting.at(address, SIZE), 1, Path(folder))
    for _ in all_sums(ranks):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
