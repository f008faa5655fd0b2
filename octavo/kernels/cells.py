"""Which weight format stays packed on which device, in which product: one table. No torch.

Asked by refusals (`limits.py`) and by the page that shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from octavo.formats import GRID_FORMATS, WEIGHT_FORMATS
from octavo.planes import plane_layout

UNPACKED = "`--dtype bfloat16`"
_AS_STORED = "packed, unpacked for a product"
KEPT_BLOCKS = (*GRID_FORMATS, "tq1_0", "tq2_0")
"""What a GPU keeps as it is stored, for want of planes: numbers are made of a matrix for each
product with it."""


class Cells(NamedTuple):
    """What becomes of one format."""

    format: str
    cpu: str
    gpu_products: str
    gpu_experts: str


def cells() -> Iterator[Cells]:
    """Yields a row of the table for each format whose elements share scales."""
    for name, form in WEIGHT_FORMATS.items():
        if not form.is_block:
            continue
        layout = plane_layout(name)
        if name in KEPT_BLOCKS:
            yield Cells(name, "packed", _AS_STORED, _AS_STORED)
            continue
        if layout is None:
            yield Cells(name, "packed", UNPACKED, UNPACKED)
            continue
        rows = "values" if not layout.is_summed else "sums"
        yield Cells(name, "packed", f"packed, {rows} scaled", f"packed, {rows} scaled")


def kept_on_gpus() -> list[str]:
    """Returns the formats that a GPU keeps packed, in products and experts."""
    return [row.format for row in cells() if row.gpu_products != UNPACKED]


def table() -> str:
    """Returns the table as Markdown."""
    head = "| format | CPU | GPU, products | GPU, experts |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(f"| {' | '.join(row)} |" for row in cells())
