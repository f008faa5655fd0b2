"""The one file that speaks to llguidance: grammars are compiled, and matched token by token.

Used by `guide` in the engine and by `check` at the faces, from any thread: compiling and masks give
the interpreter's lock back. The library is loaded with the first grammar, not before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from octavo.errors import RequestError
from octavo.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

Words = NDArray[np.uint32]

MAX_CACHED = 64
"""Compiled grammars that are kept beside those in use."""
LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 25_000,
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}
"""Of the library: 20 ms to build the lexer, 15 ms of it and 3 ms of parsing a token, 50 MB of
states a grammar."""
MAX_REASON_CHARS = 300
_NOTHING = "no text fits it, or none that ends"


class GrammarError(RequestError):
    """A grammar cannot be had, or has come to where it cannot go on."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the output cannot be bound so: {reason}", param="structured_outputs")
        self.reason = reason


class Matcher:
    """Where one output stands in its grammar. One owner; not thread-safe."""

    __slots__ = ("_inner",)

    def __init__(self, inner: LLMatcher) -> None:
        self._inner = inner

    def advance(self, token_ids: Sequence[int]) -> None:
        """Takes tokens that the mask has allowed. Raises GrammarError for others."""
        if not self._inner.consume_tokens(list(token_ids)):
            raise GrammarError(_reason(self._inner) or f"tokens {list(token_ids)} do not fit")

    def rollback(self, num_tokens: int) -> None:
        """Takes back the newest tokens."""
        if num_tokens and not self._inner.rollback(num_tokens):
            raise GrammarError(_reason(self._inner))

    def accepts(self, token_ids: Sequence[int]) -> int:
        """Returns how many of these tokens could come next; nothing changes."""
        return self._inner.validate_tokens(list(token_ids))

    def copy(self) -> Matcher:
        """Returns one that stands at the same place and goes its own way."""
        return Matcher(self._inner.deep_copy())

    @property
    def can_end(self) -> bool:
        """Whether what has come is a whole text of the grammar."""
        return self._inner.is_accepting()

    @property
    def is_complete(self) -> bool:
        """Whether it is, and nothing can follow."""
        return self._inner.is_stopped() and not self._inner.is_error()

    @property
    def error(self) -> str:
        """Why it cannot go on; empty: it can."""
        return _reason(self._inner) if self._inner.is_error() else ""


class _Library(NamedTuple):
    tokenizer: LLTokenizer
    limits: Any
    executor: LLExecutor
    matcher: type[LLMatcher]


class Compiler:
    """Compiles for one vocabulary; the newest grammars are kept. Thread-safe."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], vocab_size: int, num_threads: int = 1
    ) -> None:
        """`vocabulary` is asked once, at the first grammar. `vocab_size` V is the model's: masks
        have a bit for each of its ids. `num_threads` make the masks of one step."""
        self._vocabulary = vocabulary
        self._num_threads = num_threads
        self.vocab_size = vocab_size
        self._lock = Lock()
        self._library: _Library | None = None
        self._compiled: OrderedDict[str, Matcher] = OrderedDict()

    def load(self) -> _Library:
        """Makes the library's tokenizer, unless it is there."""
        with self._lock:
            if self._library is None:
                self._library = _load(self._vocabulary(), self.vocab_size, self._num_threads)
            return self._library

    def find(self, grammar: str) -> Matcher | None:
        """Returns a matcher at the beginning of a grammar that is kept compiled."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is None:
                return None
            self._compiled.move_to_end(grammar)
            return found.copy()

    def compile(self, grammar: str) -> Matcher:
        """Returns a matcher at the beginning of `grammar`. Raises GrammarError with the reason."""
        found = self.find(grammar)
        if found is not None:
            return found
        matcher = self._made(grammar)
        # What is not found out by compiling, the first mask shows: nothing may come.
        mask = self.masks([matcher])[0]
        if matcher.error:
            raise GrammarError(_NOTHING)
        if not mask.any() and not matcher.can_end:
            raise GrammarError("the model's vocabulary cannot write its first character")
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
            return matcher.copy()

    def compile_alone(self, grammar: str) -> Matcher:
        """As `compile`, for one output alone, and the grammar that is kept is forgotten: all copies
        of one share its lexer, whose states add up until no copy can go on."""
        with self._lock:
            self._compiled.pop(grammar, None)
        return self._made(grammar)

    def _made(self, grammar: str) -> Matcher:
        library = self.load()
        inner = library.matcher(library.tokenizer, grammar, log_level=0, limits=library.limits)
        if inner.is_error():
            raise GrammarError(_reason(inner))
        return Matcher(inner)

    def masks(self, matchers: Sequence[Matcher]) -> Words:
        """Returns uint32 [N, ceil(V / 32)]: bit i of word w is set where id 32 w + i may come."""
        library = self.load()
        # The library's own end of text is one id more.
        num_words = -(-(self.vocab_size + 1) // 32)
        masks = np.zeros((len(matchers), num_words), np.uint32)
        if len(matchers) == 1:
            matchers[0]._inner.unsafe_compute_mask_ptr(masks.ctypes.data, masks.nbytes)
        elif matchers:
            pairs = [(matcher._inner, place) for place, matcher in enumerate(matchers)]
            library.executor.unsafe_compute_mask_ptr(
                pairs, masks.ctypes.data, 4 * num_words, len(matchers)
            )
        word, bit = divmod(self.vocab_size, 32)
        masks[:, word] &= np.uint32((1 << bit) - 1)
        return masks[:, : -(-self.vocab_size // 32)]


class _Tokens:
    """What the library asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        known = list(vocabulary.tokens[:vocab_size])
        specials = [one for one in vocabulary.specials.values() if one < vocab_size]
        self.tokens = [*known, *[b""] * (vocab_size - len(known)), b"<end of text>"]
        self.special_token_ids = [*sorted(specials), vocab_size]
        self.eos_token_id = vocab_size
        self._encode = vocabulary.encode
        self._specials = frozenset(specials)
        plain = set(range(len(known))).difference(specials)
        self._id_of = {known[one]: one for one in sorted(plain, reverse=True) if known[one]}
        self._longest = max(map(len, self._id_of), default=1)

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns the ids of what a grammar forces: other spellings of it are not allowed."""
        data = text.encode() if isinstance(text, str) else text
        ids = self._encode(data.decode("utf-8", "ignore"))
        # Some tokenizers change a text, or put a space before it; and what reads as a special token
        # is that token to them, which no text of a grammar means.
        is_exact = b"".join(map(self.tokens.__getitem__, ids)) == data
        if is_exact and self._specials.isdisjoint(ids):
            return ids
        return self._longest_first(data)

    def _longest_first(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token_id = self._id_of.get(data[start:end])
                if token_id is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                break  # no token writes this byte; the mask says the same
        return ids


def _load(vocabulary: Vocabulary, vocab_size: int, num_threads: int) -> _Library:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

    wrapper: Any = _Tokens(vocabulary, vocab_size)
    return _Library(
        LLTokenizer(wrapper), LLParserLimits(**LIMITS), LLExecutor(num_threads), LLMatcher
    )


def _reason(inner: LLMatcher) -> str:
    """Returns the library's words, on one line, without its state."""
    text = inner.get_error().partition("<state>")[0].replace("<non-verbose/>", "")
    if text.startswith("NoExtensionBias"):
        return _NOTHING
    return " ".join(text.split())[:MAX_REASON_CHARS]
