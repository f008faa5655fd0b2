"""What routers learn that look at an engine now and then: the same as one that sees every step."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
from hypothesis import given, settings

from octavo.fleet.news import News, NewsLog

HASHES = st.lists(st.integers(0, 12), max_size=4, unique=True)
STEPS = st.lists(st.tuples(HASHES, HASHES, st.integers(0, 9)), max_size=30)


def packed(hashes: list[int]) -> bytes:
    return array("Q", hashes).tobytes()


def learn(known: set[int], news: News) -> None:
    """As `Router` is told."""
    if news.is_whole:
        known.clear()
    known.difference_update(array("Q", news.removed))
    known.update(array("Q", news.stored))


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, looks=st.sets(st.integers(0, 30)))
def test_whoever_looks_now_and_then_knows_in_the_end_what_is_held(
    steps: list[tuple[list[int], list[int], int]], looks: set[int]
) -> None:
    log = NewsLog(100, max_kept=5)
    held, known = set[int](), set[int]()
    number: int | None = None
    for place, (stored, removed, chance) in enumerate(steps):
        if is_cleared := chance == 0:
            held.clear()
        held.difference_update(removed)
        held.update(stored)
        log.note(packed(stored), packed(removed), is_cleared)
        if place in looks:
            news = log.since(number)
            learn(known, news)
            number = news.number
            assert known == held
    learn(known, log.since(number))
    assert known == held


def test_only_what_is_new_is_told_and_everything_to_whoever_missed_much() -> None:
    log = NewsLog(100, max_kept=2)
    log.note(packed([1]), b"", False)
    first = log.since(None)
    assert (first.is_whole, first.stored) == (True, packed([1]))
    assert log.since(first.number) == News(number=first.number)
    log.note(packed([2]), packed([1]), False)
    assert log.since(first.number) == News(
        number=first.number + 1, stored=packed([2]), removed=packed([1])
    )
    for hash_ in (3, 4):
        log.note(packed([hash_]), b"", False)
    assert log.since(first.number) == News(
        number=first.number + 3, is_whole=True, stored=packed([2, 3, 4])
    )


def test_no_more_is_held_than_the_engine_has_room_for() -> None:
    log = NewsLog(2)
    log.note(packed([1, 2, 3]), b"", False)
    assert log.since(None).stored == packed([2, 3])
