"""Where each bound output stands, and which tokens may come next: the engine's side of grammars.

Made by the engine core, one `Guide` a sequence, kept by the scheduler with it. Compiling happens in
threads, so that neither the loop nor a step waits for it.

    compiling -> (free, until `begins_after` has come) -> bound -> over
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np

from octavo.constraint import Constraint
from octavo.errors import RequestError
from octavo.grammar.compiler import Compiler, Matcher, Words
from octavo.grammar.vocabulary import Vocabulary

NUM_COMPILERS = 2
"""Threads: a grammar that takes long does not hold up all others."""


class Guide:
    """Leads one sequence through its grammar. Advances with known tokens alone."""

    __slots__ = ("_begins_after", "_matcher", "_start", "_stop_ids", "_tail", "error")

    def __init__(
        self, start: Future[Matcher], begins_after: tuple[int, ...], stop_ids: Collection[int]
    ) -> None:
        """`start` comes to a matcher of its own at the grammar's beginning. `stop_ids` end the
        sequence; they may come where a text of the grammar may end, and nowhere else."""
        self._start = start
        self._matcher: Matcher | None = None
        self._begins_after = begins_after
        self._tail: tuple[int, ...] = ()
        self._stop_ids = np.array(sorted(stop_ids), np.int64)
        self.error = ""
        """Why the sequence cannot go on; empty: it can."""

    @property
    def is_ready(self) -> bool:
        """Whether its grammar is compiled, or known to be none."""
        return self._start.done()

    @property
    def is_free(self) -> bool:
        """Whether it still reasons."""
        return bool(self._begins_after)

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow what has come."""
        return not self.is_free and not self.error and self.matcher.is_complete

    @property
    def can_end(self) -> bool:
        return not self.is_free and not self.error and self.matcher.can_end

    @property
    def matcher(self) -> Matcher:
        """Waits for the grammar. Raises GrammarError."""
        if self._matcher is None:
            self._matcher = self._start.result()
        return self._matcher

    def advance(self, token_id: int) -> None:
        """Takes the sequence's newest token; one that cannot be is kept as `error`."""
        if self.is_free:
            length = len(self._begins_after)
            self._tail = (*self._tail, token_id)[-length:]
            if self._tail == self._begins_after:
                self._begins_after = ()
            return
        try:
            self.matcher.advance((token_id,))
        except RequestError as error:
            self.error = str(error)

    def mark_stops(self, mask: Words, *, may_stop: bool = True) -> None:
        """Sets or clears the bits of the ids that end the sequence. `mask` is what the grammar
        allows, [ceil(V / 32)]; where nothing else is left they are set also if they may not be."""
        words, bits = np.divmod(self._stop_ids, 32)
        values = np.left_shift(np.uint32(1), bits.astype(np.uint32))
        np.bitwise_and.at(mask, words, ~values)
        if self.can_end and (may_stop or not mask.any()):
            np.bitwise_or.at(mask, words, values)


class Guides:
    """All guides of an engine, over one vocabulary. One thread calls it."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], vocab_size: int, num_threads: int = 1
    ) -> None:
        """`vocabulary` is asked in a thread, at the first grammar. `num_threads` make masks."""
        self._compiler = Compiler(vocabulary, vocab_size, num_threads)
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(NUM_COMPILERS, thread_name_prefix="octavo-grammar")
        self._pending: set[Future[Matcher]] = set()

    def warm_up(self) -> None:
        """Begins to load what the first grammar needs."""
        self._threads.submit(self._compiler.load)

    def guide(self, constraint: Constraint, stop_ids: Collection[int]) -> Guide:
        """Returns the guide of one sequence, whose grammar may still be compiled."""
        start: Future[Matcher]
        found = self._compiler.find(constraint.grammar)
        if found is not None:
            start = Future()
            start.set_result(found)
        else:
            start = self._threads.submit(self._compiler.compile, constraint.grammar)
            self._pending.add(start)
        known = [token_id for token_id in stop_ids if token_id < self._vocab_size]
        return Guide(start, constraint.begins_after, known)

    def settle(self, seconds: float) -> None:
        """Waits for grammars that are being compiled, so long at most."""
        if self._pending:
            self._pending -= wait(self._pending, seconds).done

    def masks(self, guides: Sequence[Guide | None], may_stop: Sequence[bool]) -> Words:
        """Returns uint32 [N, ceil(V / 32)]: what each guide's sequence may go on with.

        All of it for None, whose tokens nobody will read, and for one that has come to an error.
        """
        masks = np.full((len(guides), -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        if left := self._vocab_size % 32:
            masks[:, -1] = (1 << left) - 1
        bound: list[int] = []
        matchers: list[Matcher] = []
        for place, guide in enumerate(guides):
            if guide is None or guide.error or guide.is_free:
                continue
            try:
                matchers.append(guide.matcher)
                bound.append(place)
            except RequestError as error:
                guide.error = str(error)
        if bound:
            masks[bound] = self._compiler.masks(matchers)
        for place, guide in enumerate(guides):
            if guide is None or guide.error:
                continue
            if place in bound:
                guide.error = guide.matcher.error
            guide.mark_stops(masks[place], may_stop=may_stop[place])
            if not masks[place].any():
                guide.error = guide.error or "the grammar leaves no token to go on with"
        return masks

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Checker:
    """Grammars at a face: refused there, before anything runs. Thread-safe.

    Compiles with single bytes for a vocabulary: whether a grammar can be had does not depend on it.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._vocabulary = vocabulary
        self._compiler: Compiler | None = None

    def check(self, grammar: str) -> None:
        """Raises GrammarError with the reason if the engine could not hold an output to it."""
        if self._compiler is None:
            reduced = self._vocabulary().reduced()
            self._compiler = Compiler(lambda: reduced, len(reduced.tokens))
        self._compiler.compile(grammar)

    def knows(self, grammar: str) -> bool:
        """Whether checking it takes no time."""
        return self._compiler is not None and self._compiler.find(grammar) is not None
