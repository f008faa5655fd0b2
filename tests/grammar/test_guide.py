"""Where outputs may go and end, token by token."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.constraint import FORM_TOO_LARGE, Constraint, StructuredOutputsParams
from octavo.errors import RequestError
from octavo.grammar import Checker, Guides, grammar_text
from octavo.grammar.compiler import MAX_CACHED, Compiler
from tests.grammar.bytes_model import (
    END_THINK,
    EOS,
    SPECIALS,
    THINK,
    VOCAB_SIZE,
    VOCABULARY,
    bits,
    draw,
    guide_of,
    make_guides,
)


@pytest.fixture
def guides() -> Any:
    made = make_guides()
    yield made
    made.close()


def random_text(guides: Guides, seed: int, **wanted: Any) -> tuple[str, str]:
    output = draw(guides, guide_of(guides, StructuredOutputsParams(**wanted)), seed)
    return output.text, output.end


@settings(deadline=None, max_examples=60)
@given(
    choices=st.lists(st.text(max_size=8), min_size=1, max_size=5, unique=True),
    seed=st.integers(0, 2**32),
)
def test_a_choice_is_one_of_the_texts(choices: list[str], seed: int) -> None:
    guides = make_guides()
    try:
        text, end = random_text(guides, seed, choice=choices)
    finally:
        guides.close()
    assert end in ("eos", "over")
    assert text in choices


PATTERNS = ("[a-c]{2}/x+", r"\d{3}-\d{4}", "(?i)yes|no", "a\nb", r"[^\x00-\x1f]{1,5}", r"^ab?$")


@pytest.mark.parametrize("place", range(len(PATTERNS)))
def test_the_whole_output_matches_the_pattern(guides: Guides, place: int) -> None:
    for seed in range(20):
        text, end = random_text(guides, seed, regex=PATTERNS[place])
        assert end != "cut" or place == 0  # x+ may go on for long
        assert re.fullmatch(PATTERNS[place], text), text


SUMS = """root ::= term ([-+] term)*
term ::= [0-9] | "(" root ")"
"""
LARK_SUMS = r"""start: term (/[-+]/ term)*
term: /[0-9]/ | "(" start ")"
"""


@pytest.mark.parametrize("grammar", [SUMS, LARK_SUMS], ids=["gbnf", "lark"])
def test_a_grammar_in_either_form(guides: Guides, grammar: str) -> None:
    for seed in range(20):
        text, end = random_text(guides, seed, grammar=grammar)
        if end != "cut":
            assert isinstance(eval(text), int)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"regex": "(a)\\1"}, "backreferences"),
    ({"regex": "a(?=b)"}, "look-around"),
    ({"regex": "("}, "unclosed group"),
    ({"grammar": 'start: start "a"'}, "no text fits it"),
    ({"grammar": "start: a\na: b\nb: a"}, "no text fits it"),
    ({"grammar": "start: nowhere"}, "nowhere"),
    ({"grammar": "\n".join(f"r{i}: r{i + 1}" for i in range(3000))}, "3000 rules; at most 1000"),
    ({"grammar": "anything at all"}, "cannot be bound so"),
    ({"grammar": 'root ::= "a" ('}, "GBNF"),
    ({"grammar": 'start: "a" <|nothing|>'}, "unknown special token"),
    ({"json_object": True, "whitespace_pattern": "("}, "unclosed group"),
    ({"structural_tag": {"format": {"type": "poem"}}}, "format.type is 'poem'"),
    ({"structural_tag": {"structures": []}}, "triggers must be a list"),
    ({"structural_tag": {"structures": [], "triggers": ["<"]}}, "triggers and the tags"),
    (
        {"structural_tag": {"structures": [{"begin": "[", "end": ""}], "triggers": ["<"]}},
        "has none that begins",
    ),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_cannot_be_had_is_refused_with_the_reason(place: int) -> None:
    wanted, reason = REFUSED[place]
    checker = Checker(SPECIALS)
    with pytest.raises(RequestError, match=reason) as raised:
        checker.check(grammar_text(StructuredOutputsParams(**wanted), SPECIALS))
    assert "<state>" not in str(raised.value)


OLD_TAG = {
    "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
    "triggers": ["<f="],
}


def consumes(guides: Guides, wanted: dict[str, Any], text: str) -> tuple[int, bool]:
    """Returns how many bytes of a text can come, and whether it may end there."""
    matcher = guide_of(guides, StructuredOutputsParams(structural_tag=wanted)).matcher
    ids: list[int] = []
    for piece in re.split("(<eos>|<think>|</think>)", text):
        ids += [SPECIALS[piece]] if piece in SPECIALS else list(piece.encode())
    count = matcher.accepts(ids)
    matcher.advance(ids[:count])
    return count, matcher.can_end


def test_free_text_with_bound_parts(guides: Guides) -> None:
    assert consumes(guides, OLD_TAG, "hello") == (5, True)
    assert consumes(guides, OLD_TAG, "hi <f=a>12</f> more") == (19, True)
    assert consumes(guides, OLD_TAG, "hi <f=a>x") == (8, False)
    assert consumes(guides, OLD_TAG, "hi <f=b>") == (6, False)
    assert consumes(guides, OLD_TAG, "a < b") == (5, True)


def test_special_tokens_of_a_tag_are_those_very_tokens(guides: Guides) -> None:
    tag = {
        "format": {
            "type": "sequence",
            "elements": [
                {
                    "type": "tag",
                    "begin": "<think>",
                    "content": {"type": "any_text"},
                    "end": "</think>",
                },
                {"type": "json_schema", "json_schema": {"enum": [1, 2]}},
            ],
        }
    }
    assert consumes(guides, tag, "<think>well ...</think>1") == (11, True)
    guide = guide_of(guides, StructuredOutputsParams(structural_tag=tag))
    assert bits(guides.masks([guide], [True])[0]) == [THINK]
    guide.advance(THINK)
    allowed = bits(guides.masks([guide], [True])[0])
    assert END_THINK in allowed
    assert ord("<") in allowed  # as text
    assert EOS not in allowed


@pytest.mark.parametrize("is_needed", [False, True])
def test_tags_as_many_as_asked(guides: Guides, is_needed: bool) -> None:
    tags = {
        "type": "tags_with_separator",
        "separator": ";",
        "tags": [
            {"begin": "<a>", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "</a>"},
            {"begin": "<b>", "content": {"type": "const_string", "value": "x"}, "end": "</b>"},
        ],
        "at_least_one": is_needed,
    }
    assert consumes(guides, {"format": tags}, "") == (0, not is_needed)
    assert consumes(guides, {"format": tags}, "<a>1</a>;<b>x</b>") == (17, True)
    once = {**tags, "stop_after_first": True}
    assert consumes(guides, {"format": once}, "<a>1</a>;") == (8, True)
    free = {**tags, "type": "triggered_tags", "triggers": ["<a", "<b"]}
    assert consumes(guides, {"format": free}, "say ") == (4, not is_needed)
    assert consumes(guides, {"format": free}, "say <b>x</b> so") == (15, True)
    assert consumes(guides, {"format": free}, "say <b>y") == (7, False)


def test_reasoning_is_free_but_does_not_end(guides: Guides) -> None:
    wanted = StructuredOutputsParams(choice=["yes"])
    guide = guide_of(guides, wanted, thought_ends=(END_THINK,), starts_inside=True)
    for token_id in [ord("h"), EOS - 1, ord("m"), END_THINK]:
        allowed = bits(guides.masks([guide], [True])[0])
        assert allowed == [one for one in range(VOCAB_SIZE) if one != EOS]
        guide.advance(token_id)
        assert not guide.is_over
    assert bits(guides.masks([guide], [True])[0]) == [ord("y")]


def test_an_output_may_begin_with_reasoning(guides: Guides) -> None:
    wanted = StructuredOutputsParams(choice=["yes"])
    reasoning = {"thought_begins": (THINK,), "thought_ends": (END_THINK,)}
    thinking = guide_of(guides, wanted, **reasoning)
    assert bits(guides.masks([thinking], [True])[0]) == [ord("y"), THINK]
    thinking.advance(THINK)
    assert thinking.is_free
    thinking.advance(END_THINK)
    assert bits(guides.masks([thinking], [True])[0]) == [ord("y")]
    direct = guide_of(guides, wanted, **reasoning)
    direct.advance(ord("y"))
    assert bits(guides.masks([direct], [True])[0]) == [ord("e")]


@pytest.mark.parametrize("grammar", ["", grammar_text(StructuredOutputsParams(choice=["yes"]))])
@pytest.mark.parametrize("starts_inside", [False, True])
def test_reasoning_ends_with_its_budget(guides: Guides, grammar: str, starts_inside: bool) -> None:
    begins = () if starts_inside else (THINK,)
    guide = guides.guide(
        Constraint(
            grammar=grammar,
            thought_begins=begins,
            thought_ends=(END_THINK,),
            starts_inside=starts_inside,
            thought_budget=2,
        ),
        [EOS],
    )
    for token_id in (*begins, ord("h"), ord("m")):
        assert token_id in bits(guides.masks([guide], [True])[0])
        guide.advance(token_id)
    assert bits(guides.masks([guide], [True])[0]) == [END_THINK]
    guide.advance(END_THINK)
    allowed = bits(guides.masks([guide], [True])[0])
    assert allowed == ([ord("y")] if grammar else [*range(VOCAB_SIZE)])
    if not grammar:
        assert bits(guides.masks([guide], [False])[0]) == [
            one for one in range(VOCAB_SIZE) if one != EOS
        ]
        guide.advance(THINK)
        assert not guide.is_over
        guide.advance(EOS)
        assert guide.is_over


def test_an_answer_that_does_not_reason_has_no_budget(guides: Guides) -> None:
    reasoning = {"thought_begins": (THINK,), "thought_ends": (END_THINK,), "thought_budget": 0}
    guide = guides.guide(Constraint(grammar="", **reasoning), [EOS])
    assert bits(guides.masks([guide], [True])[0]) == [*range(VOCAB_SIZE)]
    for _ in range(3):
        guide.advance(ord("a"))
        assert bits(guides.masks([guide], [True])[0]) == [*range(VOCAB_SIZE)]
    guide.advance(EOS)
    assert guide.is_over


def test_ends_may_come_where_a_text_may_end_and_nowhere_else(guides: Guides) -> None:
    wanted = StructuredOutputsParams(regex="ab*")
    guide = guides.guide(
        Constraint(grammar=grammar_text(wanted)),
        [EOS, ord("b"), VOCAB_SIZE + 5],
    )
    both = VOCABULARY.tokens.index(b"ab")
    assert bits(guides.masks([guide], [True])[0]) == [ord("a"), both]
    guide.advance(ord("a"))
    assert bits(guides.masks([guide], [True])[0]) == [ord("b"), EOS]
    # Too early for an end, but b is one too: nothing else is left, so the grammar wins.
    assert bits(guides.masks([guide], [False])[0]) == [ord("b"), EOS]
    plain = guide_of(guides, wanted)
    plain.advance(ord("a"))
    assert bits(guides.masks([plain], [False])[0]) == [ord("b")]


def test_nothing_can_follow_a_whole_text(guides: Guides) -> None:
    guide = guide_of(guides, StructuredOutputsParams(choice=["a", "ab"]))
    guide.advance(ord("a"))
    assert guide.can_end
    assert not guide.is_over
    guide.advance(ord("b"))
    assert guide.is_over


def test_a_token_that_cannot_be_is_an_error_of_its_sequence(guides: Guides) -> None:
    guide = guide_of(guides, StructuredOutputsParams(choice=["a"]))
    guide.advance(ord("b"))
    assert guide.error
    masks = guides.masks([guide, None], [True, True])
    assert [len(bits(mask)) for mask in masks] == [VOCAB_SIZE, VOCAB_SIZE]


def test_tokens_are_taken_back(guides: Guides) -> None:
    matcher = guide_of(guides, StructuredOutputsParams(regex="a[0-9]{3}")).matcher
    matcher.advance([ord("a"), ord("1"), ord("2")])
    matcher.rollback(2)
    matcher.advance([ord("7"), ord("8"), ord("9")])
    assert matcher.is_complete


def test_masks_of_many_are_those_of_each(guides: Guides) -> None:
    some = [guide_of(guides, StructuredOutputsParams(regex=f"a{{{n}}}b*")) for n in range(1, 7)]
    for guide in some[3:]:
        guide.advance(ord("a"))
    alone = [bits(guides.masks([guide], [True])[0]) for guide in some]
    assert [bits(mask) for mask in guides.masks(some, [True] * len(some))] == alone


def test_compiled_grammars_are_kept_but_not_all() -> None:
    compiler = Compiler(lambda: VOCABULARY, VOCAB_SIZE)
    texts = [grammar_text(StructuredOutputsParams(regex=f"a{{{n}}}")) for n in range(1, 100)]
    for text in texts:
        compiler.compile(text)
    assert compiler.find(texts[0]) is None
    assert compiler.find(texts[-MAX_CACHED]) is not None


def test_others_go_on_while_a_large_grammar_is_compiled() -> None:
    properties = {
        f"p{i}": {"type": "string", "pattern": f"^[a-z]{{{i % 20 + 1}}}x{i}$"} for i in range(1500)
    }
    schema = {"type": "object", "properties": properties, "required": [*properties][:1200]}
    wanted = StructuredOutputsParams(json=schema)
    compiler = Compiler(lambda: VOCABULARY, VOCAB_SIZE)
    compiler.load()
    thread = threading.Thread(target=compiler.compile, args=(grammar_text(wanted),))
    turns = 0
    thread.start()
    while thread.is_alive():
        turns += 1
        time.sleep(0)
    # With the lock held there would be hardly any.
    assert turns > 100


def test_what_one_output_has_used_up_is_not_missing_to_others(guides: Guides) -> None:
    """The library's copies share the states of a lexer."""
    wanted = StructuredOutputsParams(regex="((a{1,1000}){1,1000}){1,1000}")
    beside = guide_of(guides, wanted)
    guides.masks([beside], [True])
    for _ in range(3):
        guide = guide_of(guides, wanted)
        for _ in range(1000):
            guides.masks([guide], [True])
            if guide.error:
                break
            guide.advance(ord("a"))
        assert guide.error.startswith(FORM_TOO_LARGE + "lexer error"), guide.error
        for other in (beside, guide_of(guides, wanted)):
            other.advance(ord("a"))
            assert ord("a") in bits(guides.masks([other], [True])[0])
            assert not other.error
