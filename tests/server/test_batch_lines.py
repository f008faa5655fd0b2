"""The lines of a batch's file, and who owns a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.server.batches.lines import LineReader
from octavo.server.store.owners import Owner
from tests.server.batch_jobs import TEXT


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 78, 79, 80, 81, 82, 200]).map(lambda n: b"x" * n), max_size=30),
    st.booleans(),
)
def test_every_line_that_is_not_empty_is_read_once_with_its_number(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes], has_end: bool
):
    path = tmp_path_factory.mktemp("lines") / "file"
    path.write_bytes(b"\n".join(content) + b"\n" * has_end)
    reader = LineReader(path, (TEXT,), 80)
    found = []
    while (lines := reader.next({2, 5})) is not None:
        found += lines
    reader.close()
    wanted = [n for n, one in enumerate(content, 1) if one and n not in (2, 5)]
    assert [one.number for one in found] == wanted
    ends = {n: has_end or n < len(content) for n in wanted}
    assert [one.number for one in found if "more than 80 bytes" in str(one.error)] == [
        n for n in wanted if len(content[n - 1]) + ends[n] > 80
    ]


def test_an_owner_is_alive_until_it_ends(tmp_path: Path):
    one, other = Owner(tmp_path), Owner(tmp_path)
    assert one.is_alive(other.name)
    assert one.is_alive(one.name)
    other.close()
    assert not one.is_alive(other.name)
    assert not one.is_alive("nobody")
    one.remove_dead()
    assert [path.name for path in (tmp_path / "owners").iterdir()] == [one.name]
    one.close()
