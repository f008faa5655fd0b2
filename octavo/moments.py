"""What happened to a traced sequence in the engine: told with its tokens, made spans of elsewhere.

Filled by the scheduler for requests that are traced, and for no others.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MomentKind = Literal["lookup", "prefill", "preempted"]


class Moment(msgspec.Struct, array_like=True):
    """Times are seconds of the host's monotonic clock.

    kind        start, end                      first               count
    lookup      when it was admitted            tokens looked up    tokens found
    prefill     launch and commit of a step     first token of it   tokens computed
    preempted   when it gave up its blocks      0                   tokens that it had computed
    """

    kind: MomentKind
    start: float
    end: float = 0.0
    """0: not yet."""
    first: int = 0
    count: int = 0
    detail: str = ""
    """Of a lookup: why no more was found, if that is known."""
