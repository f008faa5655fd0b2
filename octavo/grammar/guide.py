"""Where each bound output stands, and which tokens may come next: the engine's side of grammars.

Made by the engine core, one `Guide` a sequence, kept by the scheduler with it. Compiling happens in
threads, so that neither the loop nor a step waits for it.

    start (bound, or the reasoning begins) -> free (reasons, and does not end) -> bound -> ended

Without a grammar the length of the reasoning alone is held; bound means nothing then.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from octavo.constraint import FORM_TOO_LARGE, Constraint
from octavo.errors import RequestError
from octavo.grammar.compiler import Compiler, GrammarError, Matcher, Words
from octavo.grammar.deep_threads import DeepThreads
from octavo.grammar.vocabulary import Vocabulary

_LIMITS = ("oo many", "fuel")
"""Words of the library's reasons where a limit of it is reached."""
NUM_COMPILERS = 2
"""Threads: a grammar that takes long does not hold up all others."""


class Phase(Enum):
    """Where a sequence stands with its grammar."""

    START = "start"
    """Bound, but its first token may open the reasoning."""
    FREE = "free"
    BOUND = "bound"
    ENDED = "ended"


class Guide:
    """Leads one sequence through its grammar. Advances with known tokens alone."""

    __slots__ = (
        *("_alone", "_constraint", "_matcher", "_num_free", "_start", "_stop_ids", "_stops"),
        "_taken",
        *("error", "is_held", "phase"),
    )

    def __init__(
        self,
        start: Future[Matcher] | None,
        constraint: Constraint,
        stop_ids: Collection[int],
        alone: Callable[[], Matcher] | None = None,
    ) -> None:
        """`start` comes to a matcher at the grammar's beginning; None: there is no grammar. `alone`
        makes one that shares nothing with other sequences.
        `stop_ids` end the sequence; they may come where a text of the grammar may end, and nowhere
        else."""
        self.is_held = start is not None
        """Whether there is a grammar."""
        self._num_free = 0
        """Tokens of the reasoning so far."""
        self._start = start
        self._alone = alone
        self._matcher: Matcher | None = None
        self._taken: list[int] = []
        """Tokens that the matcher has been given."""
        self._constraint = constraint
        self._stop_ids = frozenset(stop_ids)
        self._stops = _bits(sorted(stop_ids))
        self.phase = Phase.FREE if constraint.starts_inside else Phase.START
        self.error = ""
        """Why the sequence cannot go on; empty: it can."""

    @property
    def is_ready(self) -> bool:
        """Whether its grammar is compiled, or known to be none."""
        return self._start is None or self._start.done()

    @property
    def is_free(self) -> bool:
        """Whether it still reasons."""
        return self.phase is Phase.FREE

    @property
    def is_over(self) -> bool:
        """Whether an end has come, or nothing can follow what has come."""
        if self.is_held and self.phase is Phase.BOUND and not self.error:
            return self.matcher.is_complete
        return self.phase is Phase.ENDED

    @property
    def can_end(self) -> bool:
        if self.is_free or self.error:
            return False
        return not self.is_held or self.matcher.can_end

    @property
    def matcher(self) -> Matcher:
        """Waits for the grammar. Raises GrammarError."""
        if self._matcher is None:
            assert self._start is not None, "there is no grammar"
            self._matcher = self._start.result().copy()
        return self._matcher

    def advance(self, token_id: int) -> None:
        """Takes the sequence's newest token; one that cannot be is kept as `error`."""
        if self.is_free:
            self._num_free += 1
            if token_id in self._constraint.thought_ends:
                self.phase = Phase.BOUND
        elif self.phase is Phase.START and token_id in self._constraint.thought_begins:
            self.phase = Phase.FREE
        elif token_id in self._stop_ids and self.can_end:
            self.phase = Phase.ENDED
        else:
            self.phase = Phase.BOUND
            if not self.is_held:
                return
            self._taken.append(token_id)
            try:
                self.matcher.advance((token_id,))
            except GrammarError as error:
                self.go_on_alone(error.reason)

    def go_on_alone(self, reason: str) -> None:
        """Called where the matcher cannot go on: perhaps since others have used up what it shares
        with them. Comes back to the same place with one of its own, once, or keeps `error`."""
        alone, self._alone = self._alone, None
        try:
            if alone is None:
                raise GrammarError(reason)
            self._matcher = alone()
            self._matcher.advance(self._taken)
        except GrammarError as error:
            is_limit = any(word in error.reason for word in _LIMITS)
            self.error = FORM_TOO_LARGE + error.reason if is_limit else str(error)

    def mark(self, mask: Words, *, may_stop: bool = True) -> None:
        """Adds to what the grammar allows, [ceil(V / 32)], what ends the sequence and what begins
        its reasoning; where nothing else is left it may end also if it may not."""
        budget = self._constraint.thought_budget
        if self.is_free and budget is not None and self._num_free >= budget:
            mask[:] = 0
            np.bitwise_or.at(mask, *_bits(self._constraint.thought_ends))
            return
        words, values = self._stops
        np.bitwise_and.at(mask, words, ~values)
        if self.phase is Phase.START and self._constraint.thought_begins:
            np.bitwise_or.at(mask, *_bits(self._constraint.thought_begins))
        if self.can_end and (may_stop or not mask.any()):
            np.bitwise_or.at(mask, words, values)


def _bits(token_ids: Sequence[int]) -> tuple[NDArray[np.int64], Words]:
    """Returns the words of ids in a mask, and the bits in them."""
    words, bits = np.divmod(np.array(token_ids, np.int64), 32)
    return words, np.left_shift(np.uint32(1), bits.astype(np.uint32))


class Guides:
    """All guides of an engine, over one vocabulary. One thread calls it."""

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], vocab_size: int, num_threads: int = 1
    ) -> None:
        """`vocabulary` is asked in a thread, at the first grammar. `num_threads` make masks."""
        self._compiler = Compiler(vocabulary, vocab_size, num_threads)
        self._vocab_size = vocab_size
        self._threads = DeepThreads(NUM_COMPILERS, "octavo-grammar")
        self._pending: dict[str, Future[Matcher]] = {}
        """By grammar."""

    def warm_up(self) -> None:
        """Begins to load what the first grammar needs."""
        self._threads.submit(self._compiler.load)

    def guide(self, constraint: Constraint, stop_ids: Collection[int]) -> Guide:
        """Returns the guide of one sequence, whose grammar may still be compiled."""
        start: Future[Matcher]
        grammar = constraint.grammar
        known = [token_id for token_id in stop_ids if token_id < self._vocab_size]
        if not grammar:
            return Guide(None, constraint, known)
        found = self._compiler.find(grammar)
        if found is not None:
            start = Future()
            start.set_result(found)
        elif grammar in self._pending:
            start = self._pending[grammar]
        else:
            start = self._pending[grammar] = self._threads.submit(self._compiler.compile, grammar)
        return Guide(start, constraint, known, lambda: self._compiler.compile_alone(grammar))

    def settle(self, seconds: float) -> None:
        """Waits for grammars that are being compiled, so long at most."""
        if self._pending:
            wait(self._pending.values(), seconds)
            self._pending = {text: one for text, one in self._pending.items() if not one.done()}

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
            if guide is None or guide.error or guide.is_free or not guide.is_held:
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
            if place in bound and guide.matcher.error:
                masks[place] = self._mask_alone(guide)
            guide.mark(masks[place], may_stop=may_stop[place])
            if not masks[place].any():
                guide.error = guide.error or "the grammar leaves no token to go on with"
        return masks

    def _mask_alone(self, guide: Guide) -> Words:
        """Returns the mask of one whose matcher cannot go on; nothing, if none can."""
        guide.go_on_alone(guide.matcher.error)
        (mask,) = self._compiler.masks([guide.matcher])
        if guide.matcher.error:
            guide.go_on_alone(guide.matcher.error)
        return mask

    def close(self) -> None:
        self._threads.close()
