"""The words between a server and a guard: what it is shown, and what it may answer.

Imported by whoever writes a guard (`octavo serve --guard module:name`) and by `server.guards`. A
guard is a function, or an async one, that takes a GuardCheck and returns a Verdict.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["input", "output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardText:
    """One text of a check."""

    role: str
    """Who wrote it: the role of its message, or prompt, input, documents, tools, template."""
    place: str
    """Where it stands in the request, like messages[0].content; in the answer, like choices[0]."""
    text: str
    is_fixed: bool = False
    """Whether it may not be rewritten: JSON that describes tools, variables of the template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardCheck:
    """What a guard is shown: all texts of a request, or a piece of one answer to it."""

    stage: Stage
    texts: tuple[GuardText, ...]
    """Of an answer one."""
    request_id: str
    route: str
    model: str
    tenant: str
    """Empty where nobody needs a key."""
    key: str
    """The name of the key, never the key."""
    index: int = 0
    """Which answer of several."""
    before: str = ""
    """What the client has of this answer already: its last 4,096 characters."""
    is_last: bool = True
    """Whether the answer ends with this piece."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is not served, or the answer ends before this piece; the client is told why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Rewrite:
    """These stand in place of the texts of the check, one for one."""

    texts: Sequence[str]


Verdict = Refuse | Rewrite | None
"""None: nothing is to be changed."""
Guard = Callable[[GuardCheck], Verdict | Awaitable[Verdict]]
