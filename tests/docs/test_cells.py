"""The table of weight formats is what the code says."""

from __future__ import annotations

from docs.make_cells import PAGE, page
from octavo.kernels.cells import KEPT_BLOCKS, cells, kept_on_gpus
from octavo.planes import PLANE_LAYOUTS


def test_the_page_has_the_table_that_the_code_makes():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text


def test_every_layout_of_planes_is_a_row():
    with_planes = set(kept_on_gpus()) - set(KEPT_BLOCKS)
    assert with_planes == PLANE_LAYOUTS.keys() - {"fp8_row"}
    assert {row.cpu for row in cells()} == {"packed"}
