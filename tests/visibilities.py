"""What tokens see, by the words of each kind alone."""

from __future__ import annotations

from hypothesis import strategies as st

from octavo.visibility import Chunk, Full, Visibility, Window

KIND = st.one_of(st.just(Full()), st.integers(1, 40).map(Window), st.integers(1, 40).map(Chunk))


def sees(kind: Visibility, position: int, other: int) -> bool:
    if other > position:
        return False
    if isinstance(kind, Window):
        return position - other < kind.size
    return not isinstance(kind, Chunk) or position // kind.size == other // kind.size
