"""Packed rows on their way to a device: taken apart into planes there, a piece at a time.

Called by sources whose matrices are packed. Never decides on a layout.
"""

from __future__ import annotations

from octavo.kernels.block_rows import planes_of
from octavo.kernels.planes import Planes
from octavo.kernels.weights import Weight
from octavo.planes import PlaneLayout

_CHUNK_ELEMENTS = 1 << 24
"""Codes that are taken apart at once: each is 4 bytes for a moment."""


def copy_packed(weight: Weight, layout: PlaneLayout, out: Planes, row: int, cols: range) -> None:
    """Fills `out` from the packed rows of `weight`, from `row` on, of some columns, which begin and
    end with steps of the layout or with the row."""
    device = out.codes.device
    step = max(1, _CHUNK_ELEMENTS // weight.cols)
    for start in range(0, len(out.codes), step):
        stop = min(start + step, len(out.codes))
        data = weight.data[row + start : row + stop].to(device)
        planes = planes_of(layout, data, weight.format.block_bytes, weight.cols, weight.table)
        part = planes.columns(layout, cols.start, cols.stop)
        for plane, source in zip(out.rows(start, stop), part, strict=True):
            plane.copy_(source)
