"""A grammar within JSON's quotes takes the same texts, as JSON spells them."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.grammar import Vocabulary
from octavo.grammar.compiler import Compiler
from octavo.grammar.json_quoted import quoted_lark
from octavo.grammar.lark import LarkWriter

VOCABULARY = Vocabulary.of_bytes({})
COMPILER = Compiler(lambda: VOCABULARY, len(VOCABULARY.tokens))
GRAMMARS = [
    r'start: "a\"b" | "\\" | "\n" "x"',
    r'start: /[a-c"]{1,3}/ ("," start)?',
    r"start: /[^a\\]/ TAIL?" "\n" r"TAIL: /(x|\t|\\|\/)+/",
    r'start: "Ab"i /z./ | /q./s',
    r'start: "\u0020".."#" /\d\w?\s/',
    r"start: /[\x00-\x22]{2}|[\]\-\u{e9}]/",
    r"start: line+" "\n" r"line: /[^\n]*/ NEW // a comment with " '"quotes"' "\n" r"NEW: /\r?\n/",
    r"start: /\D\S|\W/",
    r"start: /(?:k|s)+/i | /[k-m]{2}/i",
    r"start: /(a|)b*?/ END" "\n" r'END: /#+/ | "\n"',
]
LETTERS = 'abAzZxqkKsSlm,#! "\\/\n\t\r\x00\x1f]-1_\u00e9\u2028\U0001f600'


def takes(grammar: str, text: str) -> bool:
    matcher = COMPILER.compile(grammar)
    ids = VOCABULARY.encode(text)
    if matcher.accepts(ids) < len(ids):
        return False
    matcher.advance(ids)
    return matcher.can_end


def whole(lark: str) -> str:
    writer = LarkWriter()
    return writer.build(writer.grammar(lark))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRAMMARS), st.text(LETTERS, max_size=4))
def test_the_same_texts_are_taken(lark: str, text: str) -> None:
    spelt = json.dumps(text, ensure_ascii=False)[1:-1]
    assert takes(whole(quoted_lark(lark)), spelt) == takes(whole(lark), text)


PATCH = r"""start: "*** Begin\n" hunk+ "*** End"
hunk: ("+" | "-") /(.*)/ LF
LF: /\n/
"""


@pytest.mark.parametrize("line", ["", "tab\there", "\\n", 'a "quote" \\', "\r", "\u00e9"])
def test_lines_end_where_their_text_does(line: str) -> None:
    text = f"*** Begin\n+{line}\n-\n+{line}\n*** End"
    assert takes(whole(PATCH), text)
    assert takes(whole(quoted_lark(PATCH)), json.dumps(text, ensure_ascii=False)[1:-1])
    assert not takes(whole(quoted_lark(PATCH)), text)


def test_what_is_ignored_stays_between_terminals() -> None:
    lark = 'start: WORD "=" WORD\nWORD: /[a-z]+/\n%ignore / /'
    quoted = whole(quoted_lark(lark))
    assert takes(quoted, "ab = c")
    assert not takes(quoted, "a b = c")


@pytest.mark.parametrize("lark", GRAMMARS)
def test_what_is_drawn_is_json_and_of_the_grammar(lark: str) -> None:
    first, compiled = len(VOCABULARY.tokens) - 256, whole(quoted_lark(lark))
    for seed in range(6):
        chance, matcher, data = random.Random(seed), COMPILER.compile(compiled), bytearray()
        for _ in range(40):
            if matcher.is_complete or (matcher.can_end and chance.random() < 0.4):
                break
            words = COMPILER.masks([matcher])[0]
            ids = (first + byte for byte in range(256))
            ways = [one for one in ids if words[one // 32] >> (one % 32) & 1]
            matcher.advance([one := chance.choice(ways)])
            data.append(one - first)
        if matcher.can_end:
            text = json.loads(f'"{data.decode()}"')
            assert takes(whole(lark), text), (lark, text)


@pytest.mark.parametrize(
    "lark",
    [
        "%import common.WORD\nstart: WORD",
        'start: %json {"type": "object"}',
        "start: <|end|>",
        "start: /a$/",
        "start: /[a&&b]/",
        r"start: /\p{Lu}/",
        "start: /(?i:a)/",
        "start: /a/x",
        r"start: /[\D5]/",
        'start: "ab".."c"',
        'start: "open',
    ],
)
def test_what_has_no_such_form_is_refused_by_name(lark: str) -> None:
    with pytest.raises(RequestError, match="cannot be held to within JSON") as refused:
        quoted_lark(lark)
    assert refused.value.param == "tools"
