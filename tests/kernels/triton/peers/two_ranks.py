"""Two ranks whose memory is files that both have mapped; run by test_sums.py.

`python -m tests.kernels.triton.peers.two_ranks ADDRESS FOLDER` is rank 1: it makes the same sums
in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor

from octavo.kernels.triton.peers import sums
from octavo.parallel import Meeting, PeerMemory, TorchCollectives
from tests.kernels.triton import interpreter  # noqa: F401
from tests.kernels.triton.interpreter import DEVICE

SIZE = 2
NUM_BYTES = 1 << 11
CPU = torch.device("cpu")
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
        for rank in range(SIZE):
            path = self._folder / f"{number}-{rank}"
            with path.open("ab") as file:
                file.truncate(NUM_BYTES)
        buffers = [
            torch.from_file(
                str(self._folder / f"{number}-{rank}"), shared=True, size=NUM_BYTES,
                dtype=torch.uint8,
            )
            for rank in range(SIZE)
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


def main(address: str, folder: str) -> None:
    from tests.kernels.triton.peers.test_sums import all_sums

    assert DEVICE == "cpu"
    torch.set_num_threads(1)
    sums.UNGATED_ROWS = UNGATED_ROWS
    ranks = MappedRanks(Meeting.at(address, SIZE), 1, Path(folder))
    for _ in all_sums(ranks):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
