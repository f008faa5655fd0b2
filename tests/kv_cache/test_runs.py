"""Runs of blocks: what a row consists of, and pages handed out in a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.kv_cache.block_pool import NULL_BLOCK
from octavo.kv_cache.block_table import BlockTable
from octavo.kv_cache.free_pages import EXTENT, REGION, FreePages
from octavo.kv_cache.runs import runs_of, share_in_runs


@given(st.lists(st.integers(0, 6), max_size=40))
def test_runs_are_the_row_without_its_holes_in_as_few_pieces_as_possible(row: list[int]) -> None:
    columns, blocks, lengths = (part.tolist() for part in runs_of(np.array(row, np.int32)))
    rebuilt = [NULL_BLOCK] * len(row)
    for column, block, length in zip(columns, blocks, lengths, strict=True):
        assert length > 0
        assert block != NULL_BLOCK
        rebuilt[column : column + length] = range(block, block + length)
    assert rebuilt == row
    ends = dict(zip(np.add(columns, lengths).tolist(), np.add(blocks, lengths), strict=True))
    for column, block in zip(columns, blocks, strict=True):
        assert ends.get(column) != block, "two runs that are one"


def test_a_table_tells_the_runs_of_its_rows() -> None:
    table = BlockTable(0, 2, 10)
    table.append(1, [4, 5, 6, 9, 1])
    table.forget(1, 0, 1)
    assert [part.tolist() for part in table.runs(1)] == [[1, 3, 4], [5, 9, 1], [2, 1, 1]]
    assert table.runs(0).lengths.tolist() == []


def test_only_long_rows_count_for_the_share_in_runs() -> None:
    scattered, whole = np.arange(1, 300, 2, dtype=np.int32), np.arange(1, 151, dtype=np.int32)
    assert share_in_runs([], 16) == 1
    assert share_in_runs([scattered[:125]], 16) == 1
    assert share_in_runs([scattered, whole], 16) == 0.5


@settings(deadline=None)
@given(st.data())
def test_free_pages_are_a_set_whatever_is_taken_and_given(data: st.DataObject) -> None:
    num_pages = data.draw(st.sampled_from([3, 8, 100, 128, 300]))
    pages, expected = FreePages(num_pages), set[int]()
    out = list(range(num_pages))
    for _ in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            given_back = set(data.draw(st.lists(st.sampled_from(out), unique=True))) if out else ()
            pages.add(np.array(sorted(given_back), np.int32))
            expected |= set(given_back)
        elif data.draw(st.booleans()):
            page = data.draw(st.integers(0, num_pages - 1))
            taken = pages.take_behind(page, data.draw(st.integers(0, num_pages)))
            assert taken == list(range(page + 1, page + 1 + len(taken)))
            expected -= set(taken)
        elif data.draw(st.booleans()):
            after = data.draw(st.lists(st.integers(0, num_pages - 1), max_size=9))
            behind = pages.take_behind_each(np.array(after, np.int32)).tolist()
            for page, next_page in zip(after, behind, strict=True):
                is_taken = page + 1 in expected and after.count(page) == 1
                assert next_page == (page + 1 if is_taken else 0)
            expected -= set(behind) - {0}
        else:
            count = data.draw(st.integers(0, len(expected)))
            taken = pages.take(count, is_growing=data.draw(st.booleans()))
            assert len(set(taken)) == count
            assert set(taken) <= expected
            expected -= set(taken)
        out = [page for page in range(num_pages) if page not in expected]
        pages.check()
        assert set(pages.all().tolist()) == expected
        assert len(pages) == len(expected)


def whole(num_pages: int) -> FreePages:
    pages = FreePages(num_pages)
    pages.add(np.arange(num_pages, dtype=np.int32))
    return pages


@pytest.mark.parametrize("count", [REGION, 100, EXTENT, 3 * EXTENT])
def test_a_prompt_lies_in_one_run_while_there_is_one(count: int) -> None:
    taken = whole(4 * EXTENT).take(count, is_growing=False)
    assert taken == list(range(taken[0], taken[0] + count))


def test_a_prompt_takes_the_shortest_run_that_holds_it() -> None:
    pages = FreePages(2 * EXTENT)
    pages.add(np.r_[0:64, 72:104, 128:256].astype(np.int32))
    assert pages.take(30, is_growing=False) == list(range(72, 102))


def test_sequences_that_grow_in_turn_do_not_stand_in_each_other_s_way() -> None:
    pages = whole(8 * EXTENT)
    rows = [pages.take(1, is_growing=True) for _ in range(8)]
    for _ in range(EXTENT // 2 - 1):
        for row in rows:
            row += pages.take_behind(row[-1], 1) or pages.take(1, is_growing=True)
    assert all(len(runs_of(np.array(row, np.int32)).lengths) == 1 for row in rows)
