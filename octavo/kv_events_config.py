"""Where and how events of the KV cache are published: what `--kv-events-config` says.

Read by `config`, which checks it, and by the publisher. Fields and defaults are vLLM's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from octavo.errors import ConfigError

ENCODINGS = ("map", "array")
_FIELD = "kv_events_config"
_SCHEMES = ("tcp://", "ipc://", "inproc://")
_MAX_COUNT = 10_000_000
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEventsConfig:
    """Raises ConfigError for values that make no sense."""

    enable_kv_cache_events: bool = True
    publisher: str = "zmq"
    """"zmq", or "null" for nobody."""
    endpoint: str = "tcp://*:5557"
    """Bound if it names no host (`*`, `::`) or a place of this machine, else connected to."""
    replay_endpoint: str | None = None
    """Where subscribers ask again for what they missed; always bound."""
    buffer_steps: int = 10_000
    """Messages kept for replay."""
    hwm: int = 100_000
    """Messages that ZeroMQ keeps for one subscriber that is slow."""
    max_queue_size: int = 100_000
    """Messages that wait to be sent; more are dropped and counted."""
    topic: str = ""
    encoding: str = "map"
    """Of an event: "map" as vLLM has it since June 2026, "array" as before. Octavo's own field."""
    data_parallel_rank: int = 0
    """Which of several engines: it is in every message, and is added to ports. A fleet sets it."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            kind = {"bool": bool, "int": int}.get(str(one.type), str)
            is_right = type(value) is kind or (value is None and one.name == "replay_endpoint")
            if not is_right:
                raise _wrong(one.name, f"must be {kind.__name__}, got {value!r}")
        for name, known in (("publisher", ("zmq", "null")), ("encoding", ENCODINGS)):
            if getattr(self, name) not in known:
                message = f"must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                raise _wrong(name, message)
        for name in ("buffer_steps", "hwm", "max_queue_size"):
            if not 1 <= getattr(self, name) <= _MAX_COUNT:
                raise _wrong(name, f"must be in 1..{_MAX_COUNT}, got {getattr(self, name)}")
        for name in ("endpoint", "replay_endpoint"):
            value = getattr(self, name)
            if value is not None and not value.startswith(_SCHEMES):
                raise _wrong(name, f"must begin with {', '.join(_SCHEMES)}, got {value!r}")

        if not 0 <= self.data_parallel_rank <= _MAX_PORT:
            message = f"must be in 0..{_MAX_PORT}, got {self.data_parallel_rank}"
            raise _wrong("data_parallel_rank", message)

    @property
    def is_on(self) -> bool:
        return self.enable_kv_cache_events and self.publisher == "zmq"

    @property
    def own_endpoint(self) -> str:
        """The endpoint of this very engine."""
        return _of_rank(self.endpoint, self.data_parallel_rank)

    @property
    def own_replay_endpoint(self) -> str | None:
        """The replay endpoint of this very engine."""
        replay = self.replay_endpoint
        return None if replay is None else _of_rank(replay, self.data_parallel_rank)


def read_kv_events(text: str) -> KVEventsConfig:
    """Returns the config of a JSON object. Raises ConfigError naming what is wrong with it."""
    try:
        given: Any = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        example = '{"endpoint": "tcp://*:5557", "topic": "kv@10.0.0.1:8000@model"}'
        message = f"{_FIELD} must be a JSON object like {example}, got {text!r}"
        raise ConfigError(message, field=_FIELD)
    known = [one.name for one in fields(KVEventsConfig)]
    for name in given:
        if name not in known:
            raise _wrong(name, f"is unknown; known are {', '.join(known)}")
    return KVEventsConfig(**given)


def of_rank(text: str, rank: int) -> str:
    """Returns the JSON object for one of several engines."""
    return json.dumps(json.loads(text) | {"data_parallel_rank": rank})


def check_ranks(config: KVEventsConfig, num_engines: int) -> None:
    """Raises ConfigError if so many engines have no ports of their own."""
    first = {
        name: port
        for name in ("endpoint", "replay_endpoint")
        if (port := _port(getattr(config, name) or "")) is not None
    }
    for name, port in first.items():
        if port + num_engines - 1 > _MAX_PORT:
            message = f"has port {port}, and {num_engines} engines take so many from there on"
            raise _wrong(name, f"{message}; begin at {_MAX_PORT - num_engines + 1} or below")
    if len(first) == 2 and abs(first["endpoint"] - first["replay_endpoint"]) < num_engines:
        raise _wrong(
            "replay_endpoint",
            f"has port {first['replay_endpoint']}, which an engine's events take: {num_engines} "
            f"engines take {first['endpoint']} and on; take one that is {num_engines} or more away",
        )


def _of_rank(endpoint: str, rank: int) -> str:
    """Returns where an engine publishes: its rank is added to a port, as in vLLM, and to a name."""
    if rank == 0:
        return endpoint
    port = _port(endpoint)
    if port is not None:
        return f"{endpoint.rpartition(':')[0]}:{port + rank}"
    return endpoint if endpoint.startswith("tcp://") else f"{endpoint}_dp{rank}"


def _port(endpoint: str) -> int | None:
    """Returns the port of a TCP endpoint, if it names one."""
    port = endpoint.rpartition(":")[2]
    return int(port) if endpoint.startswith("tcp://") and port.isdecimal() else None


def _wrong(name: str, message: str) -> ConfigError:
    return ConfigError(f"{_FIELD}: {name} {message}", field=_FIELD)
