"""What an engine replica tells the ingresses of an app, beside the messages of `engine.ipc`.

Encoded as those are (msgpack), so that what crosses hosts is data and no code.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from octavo.config import EngineConfig
from octavo.engine.ipc import FromEngine, Refused, decode_from_engine, encode
from octavo.engine.prefixes import model_identity
from octavo.errors import EngineDeadError
from octavo.kv_cache.planner import MemoryPlan
from octavo.version import __version__
from octavo.weights.hub import ModelFiles

T = TypeVar("T", bound=FromEngine)


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine runs. Those of one fleet run the same."""

    version: str
    """Of Octavo."""
    model: str
    weights: str
    """What names the weights and how they are read."""

    def __str__(self) -> str:
        return f"Octavo {self.version} with {self.model} ({self.weights[:12]})"


def kind_of(config: EngineConfig, files: ModelFiles) -> Kind:
    """Returns what an engine of this config runs."""
    weights = model_identity(config, files)
    return Kind(version=__version__, model=config.model, weights=weights)


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """A replica as an ingress sees it."""

    replica: str
    kind: Kind
    plan: MemoryPlan
    num_open: int
    """Requests that it has, of all ingresses."""
    number: int
    """Of the news, to be asked with the next time."""
    is_whole: bool
    stored: bytes
    removed: bytes


decode_look = msgspec.msgpack.Decoder(Look).decode


def moved(request_id: str) -> bytes:
    """What a replica says to a request that is another's."""
    return encode(Refused(request_id, "the replica that was chosen takes no requests any more"))


def decode_answer(data: bytes, kind: type[T]) -> T:
    """Returns the answer of a call. Raises EngineDeadError if it is another message."""
    message = decode_from_engine(data)
    if not isinstance(message, kind):
        raise EngineDeadError(f"the replica answers with {type(message).__name__}")
    return message
