"""Owns what the grammars tell of calls: a name and an id once, then the arguments in pieces.

Made by `answer_parser` for one answer; the grammars of calls write into it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from octavo.tools.source import BrokenCallError, Source

MAX_NAME_LENGTH = 256
"""Characters of a name, and of what stands around it; longer ones are no calls."""


class TextPiece(NamedTuple):
    """What was added to the content or the reasoning of an answer."""

    kind: Literal["content", "reasoning"]
    text: str


class CallPiece(NamedTuple):
    """What was added to one call: first its id and name, then its arguments piece by piece."""

    number: int
    """Of the call, from 0."""
    arguments: str = ""
    """Joined over all pieces: JSON, as the model wrote it where the format has JSON."""
    id: str = ""
    name: str = ""


Piece = TextPiece | CallPiece
NewId = Callable[[str, int], str]
"""From the name and the index of a call to its id."""


class Calls:
    """The calls of one answer so far."""

    def __init__(
        self,
        source: Source,
        schemas: Mapping[str, Mapping[str, Any]],
        tell: Callable[[Piece], None],
        new_id: NewId,
    ) -> None:
        """`schemas` are those of the tools' parameters, by the tools' names."""
        self._source = source
        self._schemas = schemas
        self._tell = tell
        self._new_id = new_id
        self._has_arguments = False
        self.num_calls = 0
        self.is_open = False
        self.must_be_known = False
        """Whether only a tool's name makes a call: where nothing else tells a call from text."""

    def begin(self, name: str, call_id: str = "") -> None:
        """Announces a call; from here on it is one, whatever follows.

        Raises BrokenCallError if it cannot be one.
        """
        if not name or len(name) > MAX_NAME_LENGTH:
            raise BrokenCallError
        if self.must_be_known and name not in self._schemas:
            raise BrokenCallError
        self._source.release()
        index = self.num_calls
        self._tell(CallPiece(index, "", call_id or self._new_id(name, index), name))
        self.num_calls += 1
        self.is_open, self._has_arguments = True, False

    def add(self, text: str) -> None:
        """Adds to the arguments of the call that was begun last."""
        if text:
            self._has_arguments = True
            self._tell(CallPiece(self.num_calls - 1, text))

    def end(self) -> None:
        """Ends the call that was begun last; it has arguments, if only none."""
        if self.is_open and not self._has_arguments and not self._source.is_cut:
            self.add("{}")
        self.is_open = False

    def schema_of(self, name: str) -> Mapping[str, Any]:
        """Returns the schema of a tool's parameters, an empty one if there is no such tool."""
        return self._schemas.get(name, {})
