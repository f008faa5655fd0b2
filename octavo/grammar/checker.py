"""Grammars at a face: made of what users ask for, and refused there, before anything runs.

Owned by whoever makes requests; safe to call from threads.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

import numpy as np

from octavo.constraint import StructuredOutputsParams
from octavo.grammar.compiler import MAX_CACHED, Compiler, GrammarError, Matcher
from octavo.grammar.deep_threads import DeepThreads
from octavo.grammar.sources import grammar_text
from octavo.grammar.vocabulary import Vocabulary

NUM_CHECKERS = 2
NUM_STEPS = 4
"""Bytes of an output that are tried."""


class Checker:
    """Compiles with single bytes for a vocabulary: whether a grammar can be had does not depend on
    it."""

    def __init__(self, specials: Mapping[str, int]) -> None:
        """`specials`: the tokenizer's special tokens by their text."""
        vocabulary = Vocabulary.of_bytes(specials)
        self._specials = specials
        self._first_byte = len(vocabulary.tokens) - 256
        self._compiler = Compiler(lambda: vocabulary, len(vocabulary.tokens))
        self._threads = DeepThreads(NUM_CHECKERS, "octavo-checker")
        self._lock = Lock()
        self._known: OrderedDict[StructuredOutputsParams, str] = OrderedDict()

    def load(self) -> None:
        """Loads the library, so that the first grammar need not wait for it."""
        self._compiler.load()

    def knows(self, wanted: StructuredOutputsParams) -> bool:
        """Whether `grammar` takes no time."""
        return wanted in self._known

    def grammar(self, wanted: StructuredOutputsParams) -> str:
        """Returns the grammar of what is asked for. Raises RequestError with field and reason if
        the engine could not hold an output to it. Takes a millisecond, and a second at most."""
        with self._lock:
            found = self._known.get(wanted)
            if found is not None:
                self._known.move_to_end(wanted)
                return found
        grammar = grammar_text(wanted, self._specials)
        self._threads.submit(self.check, grammar).result()
        with self._lock:
            self._known[wanted] = grammar
            while len(self._known) > MAX_CACHED:
                self._known.popitem(last=False)
        return grammar

    def check(self, grammar: str) -> None:
        """Raises GrammarError with the reason if no output can be held to `grammar`."""
        self._go_on(self._compiler.compile(grammar))
        # One that stands within another may be reached late, and lead nowhere then.
        for inner in json.loads(grammar)["grammars"][1:] if grammar.startswith("{") else ():
            whole = {"grammars": [{**inner, "name": "start"}]}
            self._go_on(self._compiler.compile(json.dumps(whole)))

    def _go_on(self, matcher: Matcher) -> None:
        """Takes a few bytes, since some grammars become too large with the first."""
        for _ in range(NUM_STEPS):
            (bytes_allowed,) = np.unpackbits(
                self._compiler.masks([matcher]).view(np.uint8), axis=1, bitorder="little"
            )[:, self._first_byte : self._first_byte + 256]
            if matcher.error:
                raise GrammarError(matcher.error)
            ways = np.flatnonzero(bytes_allowed)
            if not len(ways) or matcher.is_complete:
                return
            byte = ord('"') if bytes_allowed[ord('"')] else int(ways[len(ways) // 2])
            matcher.advance([self._first_byte + byte])
