"""Incremental text equals the text of all ids, however they are split, and stop strings hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.engine.detokenizer import Detokenizer, WindowStream
from octavo.engine.tokenizer import Tokenizer, load_tokenizer
from octavo.request import SamplingParams
from tests.server.tiny_engine import write_model

KINDS = ("byte_tokenizer", "spm_tokenizer")
TEXTS = st.text(max_size=30) | st.lists(
    st.sampled_from(
        [
            "The quick",
            " fox",
            "\u6211\u304c\u4e16",
            "\U0001f600",
            "\n\n",
            "\xdf",
            "  ",
            "<tool>",
            "\xe9",
            "12",
        ]
    )
).map("".join)


def run(tokenizer: Tokenizer, ids: list[int], sizes: list[int], **params: Any) -> list[str]:
    """Feeds ids in pieces of these sizes (the last size again and again); returns the deltas."""
    detokenizer = Detokenizer(tokenizer, SamplingParams(**params))
    deltas = []
    sizes = list(sizes)
    while ids:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        delta = detokenizer.update(ids[:size])
        deltas.append(delta.text)
        if delta.stopped_by is not None:
            return deltas
        ids = ids[size:]
    return [*deltas, detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(text=TEXTS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_the_deltas_make_up_the_text_of_all_ids(kind, text, sizes, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    for skips in (True, False):
        wanted = tokenizer.decode(ids, skip_special_tokens=skips)
        assert "".join(run(tokenizer, ids, sizes, skip_special_tokens=skips)) == wanted


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 699), max_size=40))
def test_random_ids_of_a_byte_level_vocabulary_give_the_text_of_all_of_them(byte_tokenizer, ids):
    for skips in (True, False):
        wanted = byte_tokenizer.decode(ids, skip_special_tokens=skips)
        assert "".join(run(byte_tokenizer, ids, [1], skip_special_tokens=skips)) == wanted


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_the_window_gives_the_same_text_as_the_bytes(byte_tokenizer, text):
    ids = byte_tokenizer.encode(text)
    window = WindowStream(byte_tokenizer, True)
    assert "".join([*map(window.push, ids), window.flush()]) == byte_tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_no_delta_ends_within_a_character(kind, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("a \U0001f98a\U0001f989 ok", add_special_tokens=False)
    deltas = run(tokenizer, ids, [1])
    assert len(deltas) > 6
    assert not any("\ufffd" in delta for delta in deltas)
    # Cut off within the character, the rest is shown as what it is.
    start = next(i for i, t in enumerate(ids) if tokenizer.token_bytes(t)[:1] == b"\xf0")
    assert "\ufffd" in "".join(run(tokenizer, ids[: start + 1], [1]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_does_not_grow_with_the_text(kind, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    stream = WindowStream(tokenizer, True)
    broken = tokenizer.encode("\U0001f600", add_special_tokens=False)[:-1]
    for ids in (tokenizer.encode("The quick brown fox" * 20), broken * 30, [10**6] * 50):
        for token_id in ids:
            stream.push(token_id)
            assert len(stream._ids) <= 8


def specified(
    text: str, stops: tuple[str, ...], includes: bool, first: int
) -> tuple[str, str | None]:
    """Character by character: the first place after `first` where any stop string is complete."""
    for end in range(first + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if includes else end - len(stop)], stop
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("abc\n", max_size=25),
    stops=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3).map(tuple),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    includes=st.booleans(),
    min_tokens=st.just(0) | st.integers(0, 8),
)
def test_stop_strings_cut_exactly_and_nothing_of_them_is_shown_before(
    byte_tokenizer, text, stops, sizes, includes, min_tokens
):
    ids = byte_tokenizer.encode(text)
    first = len(byte_tokenizer.decode(ids[:min_tokens]))
    wanted, stop = specified(text, stops, includes, first)
    params = {"include_stop_str_in_output": includes, "min_tokens": min_tokens}
    deltas = run(byte_tokenizer, ids, sizes, stop=stops, **params)
    assert "".join(deltas) == wanted
    if stop is None:
        # What was shown before the end cannot have been the start of a stop string.
        shown = "".join(deltas[:-1])
        held = text[len(shown) :]
        assert not held or any(s.startswith(held) for s in stops)


def test_a_stop_string_says_how_many_ids_belong_to_the_sequence(byte_tokenizer):
    ids = byte_tokenizer.encode("user, stop here and go on")
    delta = Detokenizer(byte_tokenizer, SamplingParams(stop=("here", "zzz"))).update(ids)
    assert delta.text == "user, stop "
    assert delta.stopped_by == "here"
    before = byte_tokenizer.decode(ids[: delta.num_tokens - 1])
    through = byte_tokenizer.decode(ids[: delta.num_tokens])
    assert "here" not in before
    assert "here" in through


def test_a_stop_string_that_ends_after_min_tokens_counts_wherever_it_begins(byte_tokenizer):
    ids = byte_tokenizer.encode("xyz xy")
    text = byte_tokenizer.decode(ids)
    assert len(ids) >= 5
    for min_tokens in range(len(ids)):
        deltas = run(byte_tokenizer, ids, [1], stop=["z xy"], min_tokens=min_tokens)
        assert "".join(deltas) == "xy"
    assert "".join(run(byte_tokenizer, ids, [1], stop=["z xy"], min_tokens=len(ids))) == text


def test_stop_strings_in_the_first_min_tokens_do_not_count(byte_tokenizer):
    ids = byte_tokenizer.encode("xx", add_special_tokens=False) * 3
    assert len(ids) == 6
    deltas = run(byte_tokenizer, ids, [1], stop=["x"], min_tokens=2)
    assert "".join(deltas) == "xx"
    assert "".join(run(byte_tokenizer, ids, [1], stop=["x"])) == ""


def test_the_stop_string_that_ends_first_counts_even_within_one_token(byte_tokenizer):
    ids = byte_tokenizer.encode(" quick")
    assert len(ids) == 1
    for stops in (("ck", "u"), ("u", "ck"), ("qu", "u", "quick")):
        delta = Detokenizer(byte_tokenizer, SamplingParams(stop=stops)).update(ids)
        wanted = " " if "qu" in stops else " q"
        assert (delta.text, delta.stopped_by) == (wanted, "qu" if "qu" in stops else "u")


def test_marks_stand_for_their_tokens_and_stop_strings_are_found_around_them(tmp_path: Path):
    tokenizer = load_tokenizer(write_model(tmp_path))
    ids = [*tokenizer.encode("hello \u00e9"), 1, *tokenizer.encode("world, hello")]
    half = tokenizer.encode("\u00e9")[:1]
    marked = Detokenizer(tokenizer, SamplingParams(), {1: "\udc00"})
    text = "".join(marked.update([token_id]).text for token_id in ids) + marked.finish()
    assert text == "hello \u00e9\udc00world, hello"
    plain = Detokenizer(tokenizer, SamplingParams())
    assert plain.update(ids).text == "hello \u00e9world, hello"
    cut = Detokenizer(tokenizer, SamplingParams(), {1: "\udc00"})
    assert cut.update([*half, 1]).text == "\ufffd\udc00"
    stopped = Detokenizer(tokenizer, SamplingParams(stop=["orld"]), {1: "\udc00"})
    found = stopped.update(ids)
    assert (found.text, found.stopped_by) == ("hello \u00e9\udc00w", "orld")
