"""Owns the model's tokenizer: text to ids and back, special tokens, chat messages to ids.

Made once per process by whoever speaks text (server, LLM, demo); read by the processors of input
and output. Never imports transformers, and never lets the text of a chat message become a control
token: see `encode_chat`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers
from tokenizers import decoders

from octavo.config import EngineConfig
from octavo.device import return_free_memory
from octavo.engine.chat_template import (
    ChatOptions,
    ChatRenderer,
    Message,
    RenderedChat,
)
from octavo.engine.token_guard import TokenGuard, encode_ids, sound_text
from octavo.engine.tokenizer_files import (
    add_missing_tokens,
    apply_bos_eos,
    chat_template,
    folder_config,
    longest_spelling,
    special_tokens,
)
from octavo.errors import (
    ChatTemplateError,
    ModelError,
    ModelNotFoundError,
    RequestError,
    UnsupportedModelError,
)
from octavo.grammar import Vocabulary
from octavo.weights.checkpoint import read_text
from octavo.weights.gguf_tokenizer import (
    byte_spelling,
    tokenizer_files_from_gguf,
)
from octavo.weights.hub import ModelFiles, resolve_tokenizer

_SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tiktoken.model")
_BYTE_OF = {char: byte for byte, char in enumerate(byte_spelling())}
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")

_TENSOR_OPTIONS = {
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}
"""What transformers can make of the ids besides a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A rendered chat: the text for people, the ids for the model."""

    text: str
    token_ids: list[int]


class Tokenizer:
    """A fast tokenizer with the facts of its config. Immutable, but for a lazily built guard."""

    def __init__(
        self,
        tokenizer_json: str,
        config: Mapping[str, Any] | None = None,
        *,
        has_dummy_prefix: bool = False,
    ) -> None:
        """`config` is tokenizer_config.json, with the special tokens' map merged in.

        `has_dummy_prefix`: as in SentencePiece a space comes before every text, also before one
        that begins with a space, where the tokenizer.json alone would leave it out.
        """
        config = dict(config or {})
        try:
            self._core = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exceptions
            raise ModelError(f"tokenizer.json is broken: {error}; download it again") from error
        self._core.no_truncation()
        self._core.no_padding()
        self._config = config
        self._has_dummy_prefix = has_dummy_prefix
        self.special_tokens: dict[str, str] = special_tokens(config)
        """By role: bos_token, eos_token, ... as templates know them."""
        add_missing_tokens(self._core, config)
        apply_bos_eos(self._core, config, self.special_tokens)
        added = self._core.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {str(t.content): i for i, t in added.items()}
        self.special_ids: frozenset[int] = frozenset(i for i, t in added.items() if t.special)
        self.vocab_size: int = max(self._core.get_vocab_size(), max(added, default=-1) + 1)
        self.bos_token_id = self._role_id("bos_token")
        self.eos_token_id = self._role_id("eos_token")
        self.eot_token_id = self._role_id("eot_token")
        self.chat_template: str | None = chat_template(config)
        self.is_byte_level = isinstance(self._core.decoder, decoders.ByteLevel)
        """Whether a token's bytes do not depend on its neighbours."""
        self._bytes: dict[int, bytes] = {}
        self.whole_texts: Mapping[int, str | None] = WholeTexts(self.token_bytes)
        """`token_bytes` as text; None where they are not whole characters."""
        self._renderer: ChatRenderer | None = None
        self._guard: TokenGuard | None = None

    @staticmethod
    def from_folder(path: str | Path) -> Tokenizer:
        """Reads tokenizer.json and its companions. Raises ModelError with the way out."""
        folder = Path(path)
        if not (folder / "tokenizer.json").is_file():
            slow = [name for name in _SLOW_FILES if (folder / name).exists()]
            if slow:
                raise UnsupportedModelError(
                    f"{folder} has {', '.join(slow)} but no tokenizer.json; make one with "
                    "transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
                )
            raise ModelNotFoundError(f"there is no tokenizer.json in {folder}")
        config = folder_config(folder)
        return Tokenizer(read_text(folder / "tokenizer.json"), config)

    @staticmethod
    def from_gguf(path: str | Path) -> Tokenizer:
        """Builds the tokenizer that a GGUF file describes."""
        files = tokenizer_files_from_gguf(path)
        config = json.loads(files["tokenizer_config.json"])
        has_dummy_prefix: bool = config["add_prefix_space"]
        return Tokenizer(files["tokenizer.json"], config, has_dummy_prefix=has_dummy_prefix)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns ids; `add_special_tokens` puts BOS before where the model wants it."""
        return encode_ids(self._core, self._prefixed(text), add_special_tokens)

    def encode_pair(self, first: str, second: str) -> list[int]:
        """Returns the ids of two texts as one prompt, with what the model wants around each."""
        one, other = (sound_text(self._prefixed(text)) for text in (first, second))
        return self._core.encode(one, other).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids; ids that do not exist are left out."""
        # A batch, for which the library gives the GIL back; for one alone it keeps it.
        return self._core.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """Returns each id's piece as the vocabulary spells it ("" where there is none)."""
        return [self._core.id_to_token(i) or "" for i in ids]

    def token_bytes(self, token_id: int) -> bytes:
        """Returns what one id adds to the text, as bytes: part of a character, even."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """Returns `token_bytes` as text, with U+FFFD where it is not whole characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def is_special(self, token_id: int) -> bool:
        return token_id in self.special_ids

    def token_id(self, text: str) -> int | None:
        """Returns the id of the token that is spelled `text` in the vocabulary, if there is one."""
        return self._core.token_to_id(text)

    def is_token(self, token_id: int) -> bool:
        return self._core.id_to_token(token_id) is not None

    def vocabulary(self) -> Vocabulary:
        """Returns all ids as grammars see them. Slow, and nothing of it is kept."""
        return Vocabulary(
            tokens=[self._spell(token_id) for token_id in range(self.vocab_size)],
            specials=self.special_strings,
            encode=lambda text: encode_ids(self._core, text, False),
        )

    def with_chat_template(self, source: str) -> Tokenizer:
        """Returns a tokenizer that differs in its chat template only."""
        config = {**self._config, "chat_template": source}
        return Tokenizer(self._core.to_str(), config, has_dummy_prefix=self._has_dummy_prefix)

    @property
    def longest_spelling(self) -> int | None:
        """Characters of a text that one token stands for at most; None: any number. Slow."""
        return longest_spelling(self._core)

    @property
    def chat_renderer(self) -> ChatRenderer:
        """From messages to their text; small beside the tokenizer. Raises ChatTemplateError."""
        if self._renderer is None:
            if self.chat_template is None:
                raise ChatTemplateError(
                    "the model has no chat template; give one with chat_template, or use "
                    "completions",
                    param="messages",
                )
            specials = tuple(self.special_strings)
            self._renderer = ChatRenderer(self.chat_template, self.special_tokens, specials)
        return self._renderer

    def encode_chat(
        self, messages: Sequence[Message], options: ChatOptions | None = None
    ) -> ChatPrompt:
        """Renders messages and returns text and ids, special tokens only where the template is.

        A special token's string within messages, tools, documents or template_kwargs stands for
        its characters: it is tokenised as plain text. Ids of all other content are those of
        tokenising the rendered text. What a template builds from a role ("<|" + role + "|>") is
        the template's; the server admits known roles only. Raises ChatTemplateError.
        """
        rendered = self.chat_renderer.render(messages, options)
        return ChatPrompt(text=rendered.shown, token_ids=self.encode_rendered(rendered))

    def encode_rendered(self, rendered: RenderedChat) -> list[int]:
        """Returns the ids of what `chat_renderer` made of messages."""
        if not rendered.literals:
            return self.encode(rendered.text, add_special_tokens=False)
        if self._guard is None:
            self._guard = TokenGuard(self._core, self.special_strings)
        return self._guard.encode(rendered.text, lambda named: self._prefixed(rendered.show(named)))

    @overload
    def apply_chat_template(
        self, messages: Sequence[Message], *, tokenize: Literal[True] = True, **options: Any
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self, messages: Sequence[Message], *, tokenize: Literal[False], **options: Any
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tokenize: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> list[int] | str:
        """Returns the ids of `encode_chat`, or its text, called as transformers' users know it.

        `more` are variables of the template, such as enable_thinking. Raises RequestError.
        """
        for name in _TENSOR_OPTIONS & more.keys():
            if more.pop(name) not in (None, False):
                message = f"{name} is not supported: ids come as one list"
                raise RequestError(message, param=name)
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            template_kwargs={**(template_kwargs or {}), **more},
        )
        chosen = self if chat_template is None else self.with_chat_template(chat_template)
        prompt = chosen.encode_chat(messages, options)
        return prompt.token_ids if tokenize else prompt.text

    def _prefixed(self, text: str) -> str:
        """Returns `text` so that the tokenizer.json puts the dummy prefix before it: it takes a
        space at the beginning for the prefix itself."""
        return " " + text if self._has_dummy_prefix and text[:1] in (" ", "\u2581") else text

    def _spell(self, token_id: int) -> bytes:
        piece = self._core.id_to_token(token_id) or ""
        if self.is_byte_level:
            try:
                return bytes([_BYTE_OF[char] for char in piece])
            except KeyError:
                return piece.encode()
        if token_id in self.added_tokens.values():
            return piece.encode()
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\u2581", " ").encode()

    @property
    def special_strings(self) -> dict[str, int]:
        """The ids of all special tokens by their text."""
        return {text: i for text, i in self.added_tokens.items() if i in self.special_ids}

    def _role_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._core.token_to_id(token)


class WholeTexts(dict[int, str | None]):
    """What is spelled once need not be called for again: every streamed token looks here."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        super().__init__()
        self._token_bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text = self._token_bytes(token_id).decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


def find_tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer:
    """Returns the tokenizer that the operator gave, else the model's own."""
    given = config.tokenizer
    path = files.path if given is None else resolve_tokenizer(given, config.download_dir)
    tokenizer = load_tokenizer(path)
    return_free_memory()  # reading takes twice what is kept
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer of a folder or of a .gguf file."""
    found = Path(path)
    if found.suffix == ".gguf":
        return Tokenizer.from_gguf(found)
    if found.name == "tokenizer.json":
        found = found.parent
    return Tokenizer.from_folder(found)


def eos_token_ids(
    generation_config: Mapping[str, Any] | None, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Returns every id that ends a sequence: generation_config's (an int or a list) first.

    Raises ModelError if it is anything else.
    """
    given = (generation_config or {}).get("eos_token_id")
    ids: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    ids = [] if given is None else ids
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ModelError(f"eos_token_id is {given!r}; it must be a token id, or a list of them")
    if tokenizer is not None:
        ids += [i for i in (tokenizer.eos_token_id, tokenizer.eot_token_id) if i is not None]
    return tuple(dict.fromkeys(ids))
