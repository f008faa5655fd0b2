"""Bodies are read the same, whether the quick decoder takes them or the slow one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.server.protocol.decoding import decode

NAMES = st.sampled_from(["a", "b", "a:", '":', " :", "\\", "{", "\u00e4"])
SPACES = st.sampled_from(["", "", " ", "\n", "\t", "\r "])


@st.composite
def texts_of_json(draw: st.DrawFn, depth: int = 3) -> str:
    """JSON as somebody may write it, with names that stand twice now and then."""
    kind = draw(st.integers(0, 5 if depth else 3))
    space = draw(SPACES)
    if kind == 0:
        return space + draw(st.sampled_from(["1", "-0", "1.5", "1e5", "2e308", "null", "true"]))
    if kind == 1:
        return space + json.dumps(draw(st.text(max_size=4)), ensure_ascii=draw(st.booleans()))
    if kind == 2:
        return space + json.dumps(draw(NAMES)) + draw(SPACES)
    if kind == 3:
        return space + str(draw(st.integers(-(2**70), 2**70)))
    inner = draw(st.lists(texts_of_json(depth=depth - 1), max_size=3))
    if kind == 4:
        return f"{space}[{','.join(inner)}]"
    pairs = [f"{draw(SPACES)}{json.dumps(draw(NAMES))}{draw(SPACES)}:{one}" for one in inner]
    return f"{space}{{{','.join(pairs)}{draw(SPACES)}}}"


def reference(text: str) -> Any:
    """Python's reading; ValueError for a name that stands twice."""

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(found)) < len(found):
            raise ValueError("twice")
        return dict(found)

    return json.loads(text, object_pairs_hook=pairs)


@settings(max_examples=300, deadline=None)
@given(texts_of_json())
def test_what_is_read_is_what_python_reads(text: str) -> None:
    try:
        expected = reference(text)
    except ValueError:
        with pytest.raises(RequestError):
            decode(text.encode())
        return
    found = decode(text.encode())
    assert found == expected
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    "content",
    [
        b'{"a":1,"a":1}',
        b'{"b":{"a" :1,"a":1},"c":":"}',
        b'[1,[[{"a":1,"a":2}]]]',
        b'{"prompt":[1,{"a":1,"a":2}]}',
        b'{"a\\"":1,"a\\"":2,"c":"\\":"}',
        b"NaN",
        b'{"a":Infinity}',
        b"\xef\xbb\xbf1",
        b'"\xff"',
        b"1" * 5000,
    ],
)
def test_what_is_no_json_is_refused_whoever_reads_it(content: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        decode(content)
    assert raised.value.code == "bad_json"
