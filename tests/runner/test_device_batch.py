"""Block tables on the device are those on the host, however blocks are written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octavo.runner.device_batch import DeviceBatch
from octavo.runner.input_batch import InputBatch
from octavo.runner.transfer import HostTransfer
from octavo.step import TableDelta

ROWS, COLUMNS = 4, 200


def written(group: int, rows: list[int], columns: list[int], first: int) -> TableDelta:
    return TableDelta(
        group=group,
        rows=np.array(rows, np.int32),
        columns=np.array(columns, np.int32),
        block_ids=np.arange(first, first + len(rows), dtype=np.int32),
    )


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        ([2] * 150, list(range(10, 160))),
        ([2] * 3, [4, 5, 6]),
        ([], []),
        ([2] * 150, [10, 12, 11, *range(13, 160)]),
        ([2] * 75 + [1] + [2] * 74, list(range(10, 160))),
        ([0] * 100 + [3] * 100, [*range(100), *range(100)]),
        ([1] * 100, list(range(100))[::-1]),
    ],
)
def test_both_tables_hold_what_was_written(rows: list[int], columns: list[int]) -> None:
    host = InputBatch(max_num_seqs=ROWS, max_model_len=COLUMNS * 16, block_size=16, num_groups=2)
    last_sampled = torch.zeros(ROWS, dtype=torch.int32)
    there = DeviceBatch(host, last_sampled, torch.device("cpu"), HostTransfer())
    expected = np.zeros((2, ROWS, COLUMNS), np.int32)
    for group, first in ((1, 1), (0, 1000)):
        delta = written(group, rows, columns, first)
        there.apply((delta, written(1 - group, [3], [150], first + 500)))
        expected[group, delta.rows, delta.columns] = delta.block_ids
        expected[1 - group, 3, 150] = first + 500
        assert (host.tables == expected).all()
        assert (there._tables.numpy() == expected).all()
