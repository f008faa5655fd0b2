"""A vocabulary of bytes and a few longer tokens, and a model that draws from it at random."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.constraint import Constraint, StructuredOutputsParams
from octavo.grammar import Guide, Guides, Vocabulary, grammar_text

MORE = (b"ab", b'{"', b'":', b"true", b"12", b"</", b"\n\n", b'"}', b", ", b": ")
EOS, THINK, END_THINK = 266, 267, 268
VOCAB_SIZE = 277  # some ids that the tokenizer does not know, and no whole word of bits
SPECIALS = {"<eos>": EOS, "<think>": THINK, "</think>": END_THINK}
VOCABULARY = Vocabulary(
    tokens=[*(bytes([byte]) for byte in range(256)), *MORE, *(one.encode() for one in SPECIALS)],
    specials=SPECIALS,
    encode=lambda text: list(text.encode()),
)


class Output(NamedTuple):
    text: str
    end: str
    """over, eos, cut, or an error"""
    token_ids: list[int]


def bits(mask: NDArray[np.uint32]) -> list[int]:
    """Returns the ids that a mask allows."""
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def make_guides() -> Guides:
    return Guides(lambda: VOCABULARY, VOCAB_SIZE)


def guide_of(guides: Guides, wanted: StructuredOutputsParams, **reasoning: Any) -> Guide:
    grammar = grammar_text(wanted, SPECIALS)
    return guides.guide(Constraint(grammar=grammar, **reasoning), [EOS])


def draw(guides: Guides, guide: Guide, seed: int, max_tokens: int = 400) -> Output:
    """Returns what a model with random weights puts out; it is fond of ends."""
    chance = random.Random(seed)
    ids: list[int] = []

    def output(end: str) -> Output:
        data = b"".join(VOCABULARY.tokens[token_id] for token_id in ids)
        return Output(data.decode("utf-8", "replace"), end, ids)

    for _ in range(max_tokens):
        allowed = bits(guides.masks([guide], [True])[0])
        if guide.error:
            return output(guide.error)
        ends = [one for one in allowed if one in (EOS, ord('"'), ord("}"), ord("]"))]
        token_id = chance.choice(ends if ends and chance.random() < 0.4 else allowed)
        if token_id == EOS:
            return output("eos")
        ids.append(token_id)
        guide.advance(token_id)
        if guide.is_over:
            return output("over")
    return output("cut")
