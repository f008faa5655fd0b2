"""Four ranks whose memory is files that all have mapped; run by test_sums.py.

`python -m tests.kernels.triton.peers.four_ranks ADDRESS FOLDER RANK` is one of ranks 1 to 3: it
makes the same sums in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch

from octavo.kernels.triton.peers import sums
from octavo.parallel import Meeting
from tests.kernels.triton import interpreter  # noqa: F401
from tests.kernels.triton.peers import two_ranks
from tests.kernels.triton.peers.two_ranks import COLUMNS, CPU, EPS, MappedRanks, Sum

from octavo.kernels.triton.small.norm import rms_norm  # isort: skip

SIZE = 4
NUM_BYTES = 1 << 12
PUSHED_ROWS = 5
"""More are left to the library, so that a test sees it."""


def make_small() -> None:
    two_ranks.NUM_BYTES = NUM_BYTES
    sums.UNGATED_ROWS = two_ranks.UNGATED_ROWS
    sums.PUSHED_BYTES = PUSHED_ROWS * (SIZE - 1) * COLUMNS * 2


def all_sums(ranks: MappedRanks) -> Iterator[Sum]:
    """Makes the same sums on whichever rank it is: of rows that a rank pushes, and of more."""
    dtype = torch.bfloat16
    over = sums.over_peers(ranks, COLUMNS, dtype, CPU)
    assert isinstance(over, sums.PeerSums), "the check at start has failed"
    assert not over.takes_parts
    for case, count in enumerate((1, PUSHED_ROWS, 2, PUSHED_ROWS + 1, 1)):
        generator = torch.Generator().manual_seed(case)
        parts = torch.randint(-8, 9, (SIZE, count, COLUMNS), generator=generator).to(dtype)
        parts.view(-1)[::5] = -0.0
        expected, own = parts.float().sum(0).to(dtype), parts[ranks.rank]
        weight = torch.linspace(0.5, 2, COLUMNS)
        residual = torch.linspace(-1, 1, count * COLUMNS).view(count, COLUMNS).to(dtype)
        kept = residual.clone()
        normed = rms_norm(expected, kept, weight, EPS)
        found = over.all_reduce(own.clone())
        yield Sum(f"{count} rows", (found,), (expected,))
        out = over.add_rms_norm(own.clone(), residual, weight, EPS)
        assert (out is None) == (count > PUSHED_ROWS)
        if out is not None:
            yield Sum(f"{count} rows, normed", (residual, out), (kept, normed))


def main(address: str, folder: str, rank: str) -> None:
    torch.set_num_threads(1)
    make_small()
    for _ in all_sums(MappedRanks(Meeting.at(address, SIZE), int(rank), Path(folder))):
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
