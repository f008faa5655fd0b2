"""What changes in block tables, row by row."""

from __future__ import annotations

import numpy as np

from octavo.step import Int32, TableDelta


def row_delta(group: int, row: int, column: int, block_ids: Int32) -> TableDelta:
    """Blocks go to columns `column...` of one row."""
    count = len(block_ids)
    return TableDelta(
        group=group,
        rows=np.full(count, row, np.int32),
        columns=np.arange(column, column + count, dtype=np.int32),
        block_ids=block_ids,
    )
