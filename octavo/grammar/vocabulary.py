"""A tokenizer as grammars see it: what every id adds to the text.

Made by whoever has the tokenizer, read by `compiler`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """All ids of a model, those that its tokenizer does not know among them."""

    tokens: Sequence[bytes]
    """[V] by id; empty: never drawn."""
    specials: Mapping[str, int]
    """Special tokens by their text; they are no text, and stand only where a grammar names them."""
    encode: Callable[[str], list[int]]
    """Text to ids, nothing added: what a grammar forces is written as the model knows it."""

    @staticmethod
    def of_bytes(specials: Mapping[str, int]) -> Vocabulary:
        """Returns one in which grammars mean the same and are compiled in a fraction of the time:
        each byte is a token, with special tokens at their own ids."""
        texts = {token_id: text.encode() for text, token_id in specials.items()}
        tokens = [texts.get(token_id, b"") for token_id in range(max(texts, default=-1) + 1)]
        tokens += [bytes([byte]) for byte in range(256)]
        first = len(tokens) - 256
        return Vocabulary(
            tokens=tokens,
            specials=specials,
            encode=lambda text: [first + byte for byte in text.encode()],
        )
