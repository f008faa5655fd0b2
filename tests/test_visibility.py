"""What a token sees: nothing behind it, itself always, and what its layer says before it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.visibility import Chunk, Full, Visibility, Window
from tests.visibilities import KIND, sees

SIZES = st.integers(1, 40)


@pytest.mark.parametrize(
    ("visibility", "position", "first"),
    [
        (Full(), 9, 0),
        (Window(4), 2, 0),
        (Window(4), 3, 0),
        (Window(4), 4, 1),
        (Window(1), 7, 7),
        (Chunk(4), 3, 0),
        (Chunk(4), 4, 4),
        (Chunk(4), 7, 4),
        (Chunk(1), 7, 7),
    ],
)
def test_the_first_token_seen(visibility: Visibility, position: int, first: int):
    assert visibility.first_visible(position) == first


@given(position=st.integers(0, 1000), size=SIZES)
def test_a_token_sees_itself_and_what_leaves_sight_never_comes_back(position: int, size: int):
    for visibility in (Full(), Window(size), Chunk(size)):
        first = visibility.first_visible(position)
        assert 0 <= first <= position
        assert first <= visibility.first_visible(position + 1)


@given(position=st.integers(0, 1000), size=SIZES)
def test_windows_and_chunks_hold_at_most_their_size(position: int, size: int):
    for visibility in (Window(size), Chunk(size)):
        assert position - visibility.first_visible(position) < size


@given(KIND, st.integers(0, 200))
def test_the_first_visible_token_is_the_first_that_is_seen(kind: Visibility, at: int) -> None:
    seen = [other for other in range(at + 1) if sees(kind, at, other)]
    assert kind.first_visible(at) == seen[0]
    assert seen == list(range(seen[0], at + 1))
    assert kind.most_visible is None or len(seen) <= kind.most_visible
