"""Tokenises a rendered chat so that only the template's special tokens are special.

Made by `Tokenizer.encode_rendered` when a user's text has what looks like one. Never renders: what
is the user's and what the template's is known from `chat_template.RenderedChat`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers

from octavo.engine.chat_template import longest_first
from octavo.errors import RequestError


class TokenGuard:
    """The same tokenizer with its special tokens renamed to strings nobody can guess.

    One encoding of the whole text then takes the template's special tokens (renamed) for what they
    are and the user's (not renamed) for text, with all other ids as ever. Built when first needed:
    it costs a second copy of the vocabulary.
    """

    def __init__(self, core: tokenizers.Tokenizer, specials: Mapping[str, int]) -> None:
        nonce = secrets.token_hex(8)
        self._pattern = longest_first(specials)
        self._names = {text: f"\U000f3000{nonce}{i}\U000f3001" for text, i in specials.items()}
        data = json.loads(core.to_str())
        for added in data["added_tokens"]:
            added["content"] = self._names.get(added["content"], added["content"])
        _rename_in_model(data["model"], self._names)
        data["post_processor"] = None
        self._core = tokenizers.Tokenizer.from_str(json.dumps(data))
        for text, i in specials.items():
            assert self._core.token_to_id(self._names[text]) == i, f"added token {i} has moved"

    def encode(self, text: str, show: Callable[[str], str]) -> list[int]:
        """Returns the ids of `text`, in which `show` restores what the user wrote."""
        assert self._pattern is not None
        named = self._pattern.sub(lambda found: self._names[found[0]], text)
        return encode_ids(self._core, show(named), add_special_tokens=False)


def encode_ids(core: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Returns the ids of a text. Raises RequestError if it is no Unicode."""
    # A batch, for which the library gives the GIL back; for one text alone it keeps it. The fast
    # one leaves out where tokens lie in the text, which nobody asks.
    batch = core.encode_batch_fast([sound_text(text)], add_special_tokens=add_special_tokens)
    return batch[0].ids


def _rename_in_model(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Renames tokens in a model's vocabulary and drops merges that would build one of them."""
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(token, token): i for token, i in vocab.items()}
    elif isinstance(vocab, list):  # Unigram: pairs of piece and score
        model["vocab"] = [[names.get(token, token), score] for token, score in vocab]
    if "merges" in model:
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if left not in names and right not in names and left + right not in names
        ]
    if model.get("unk_token") is not None:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


def sound_text(text: str) -> str:
    """Refuses text that is no Unicode (JSON can smuggle in half a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text has half a surrogate pair at character {error.start}; send valid Unicode",
            param="prompt",
        ) from error
    return text
