"""The messages between front end and engine process, and their encoding (msgpack).

Used by `client` and `process`. Owns no socket and no state.
"""

from __future__ import annotations

import msgspec

from octavo.kv_cache.explain import PrefixExplanation
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.request import Request, TokenDelta


class AddRequests(msgspec.Struct, frozen=True, tag=True):
    """Requests that came together."""

    requests: list[msgspec.Raw]
    """Each encoded by itself: what one of them holds cannot spoil the message of the others."""


class AbortSequence(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    index: int | None = None


class GetStats(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    front: int = 0
    """Whom to answer."""
    is_detailed: bool = False
    """Whether each expert and each sequence is told of, too."""


class ResetPrefixCache(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    front: int = 0


class ExplainPrefix(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    request: Request
    """Which does not run."""
    front: int = 0


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish what is launched, then exit."""


ToEngine = AddRequests | AbortSequence | GetStats | ResetPrefixCache | ExplainPrefix | Shutdown


class AwaitRanks(msgspec.Struct, frozen=True, tag=True):
    """Ranks that somebody else starts are to come to host:port, with this key."""

    address: str
    key: bytes


class Ready(msgspec.Struct, frozen=True, tag=True):
    plan: MemoryPlan


class Deltas(msgspec.Struct, frozen=True, tag=True):
    deltas: list[TokenDelta]


class Held(msgspec.Struct, frozen=True, tag=True):
    """What an engine of a fleet tells all fronts, before the deltas of the same step."""

    num_open: int
    """Requests that it has, of all fronts."""
    stored: bytes = b""
    """Of `kv_cache.journal.Changes`."""
    removed: bytes = b""
    is_cleared: bool = False


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The queue is full."""

    request_id: str
    message: str


class Answer(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    value: EngineStats | bool


class Explained(msgspec.Struct, frozen=True, tag=True):
    call_id: int
    value: PrefixExplanation


class Died(msgspec.Struct, frozen=True, tag=True):
    """The last word of an engine process. `kind` is the name of an OctavoError, or empty."""

    kind: str
    message: str


FromEngine = AwaitRanks | Ready | Deltas | Held | Refused | Answer | Explained | Died

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_request = msgspec.msgpack.Decoder(Request).decode
"""Of AddRequests."""
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
