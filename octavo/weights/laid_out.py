"""Packed rows on their way to a device: taken apart into planes there, a piece at a time.

Called by sources whose matrices are packed. Never decides on a layout.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from octavo.formats import WeightFormat
from octavo.kernels.block_rows import planes_of
from octavo.kernels.planes import Planes
from octavo.kernels.weights import Weight
from octavo.planes import PlaneLayout

_CHUNK_ELEMENTS = 1 << 24
"""Codes that are taken apart at once: each is 4 bytes for a moment."""


def pieces(out: Planes, width: int) -> Iterator[range]:
    """Yields the rows of `out`, whose matrix has `width` columns, a piece at a time."""
    step = max(1, _CHUNK_ELEMENTS // width)
    for start in range(0, len(out.codes), step):
        yield range(start, min(start + step, len(out.codes)))


def lay_out(
    data: Tensor,
    form: WeightFormat,
    layout: PlaneLayout,
    width: int,
    table: Tensor | None,
    out: Planes,
    cols: range,
) -> None:
    """Fills `out` from packed rows on its device, with `width` columns, of which it takes some."""
    planes = planes_of(layout, data, form.block_bytes, width, table)
    part = planes.columns(layout, cols.start, cols.stop)
    for plane, source in zip(out, part, strict=True):
        plane.copy_(source)


def copy_packed(weight: Weight, layout: PlaneLayout, out: Planes, row: int, cols: range) -> None:
    """Fills `out` from the packed rows of `weight`, from `row` on, of some columns, which begin and
    end with steps of the layout or with the row."""
    for rows in pieces(out, weight.cols):
        data = weight.data[row + rows.start : row + rows.stop].to(out.codes.device)
        part = out.rows(rows.start, rows.stop)
        lay_out(data, weight.format, layout, weight.cols, weight.table, part, cols)
