"""Publishes what changes in the prefix cache over ZeroMQ, so that routers know what is cached.

Owned by the engine core, which hands events over once a step; a thread encodes and sends. The step
never waits: what finds the queue full is dropped, counted, and leaves a gap in the numbers of the
messages, as a slow subscriber's do.

A message is three frames: topic, its number (8 bytes, big-endian), and msgpack of [seconds since
1970, [events], rank]. Whoever sees a gap sends the first number it lacks (8 bytes) to the replay
socket (from a REQ or DEALER, after an empty frame), and gets each kept message from there on (an
empty frame, number, msgpack), last one whose number is -1 and that is empty.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from octavo.errors import ConfigError
from octavo.kv_cache.news import Event, Removed, Stored
from octavo.kv_cache.spec import KVGroup
from octavo.kv_events_config import KVEventsConfig
from octavo.visibility import Chunk, Window

logger = logging.getLogger(__name__)

MEDIUM = "GPU"
"""The tier that the engine computes from, as routers know it: on a CPU its memory."""
NUMBER_BYTES = 8
END = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)
"""The number of what ends a replay."""
_LOOK_SECONDS = 0.05
"""How long a replay may be waited for while nothing happens."""
_CLOSE_SECONDS = 2.0
_LINGER_MILLISECONDS = 500
_encode = msgspec.msgpack.Encoder().encode


class EventEncoder:
    """Events as routers of vLLM read them: maps, or arrays with the same fields in order."""

    def __init__(
        self, groups: Sequence[KVGroup], block_size: int, encoding: str, rank: int = 0
    ) -> None:
        self._kinds = [_kind(group) for group in groups]
        self._block_size = block_size
        self._is_array = encoding == "array"
        self._rank = rank

    def payload(self, seconds: float, events: Sequence[Event]) -> bytes:
        """Returns the third frame of a message."""
        return _encode([seconds, [self._plain(event) for event in events], self._rank])

    def _plain(self, event: Event) -> Any:
        fields = self._fields(event)
        return list(fields.values()) if self._is_array else fields

    def _fields(self, event: Event) -> dict[str, Any]:
        """Returns an event's fields in the order of the arrays."""
        if isinstance(event, Stored):
            kind, window = self._kinds[event.group]
            others = [None] * (len(event.digests) - 1)
            is_first = event.parent is None
            return {
                "type": "BlockStored",
                "block_hashes": list(map(_hash_of, event.digests)),
                "parent_block_hash": None if event.parent is None else _hash_of(event.parent),
                "token_ids": event.token_ids.tolist(),
                "block_size": self._block_size,
                "lora_id": None,
                "medium": MEDIUM,
                "lora_name": None,
                # As vLLM: of a prompt that is kept apart, the first block says by what.
                "extra_keys": [[event.salt], *others] if event.salt and is_first else None,
                "group_idx": event.group,
                "kv_cache_spec_kind": kind,
                "kv_cache_spec_sliding_window": window,
            }
        if isinstance(event, Removed):
            return {
                "type": "BlockRemoved",
                "block_hashes": list(map(_hash_of, event.digests)),
                "medium": MEDIUM,
                "group_idx": event.group,
            }
        return {"type": "AllBlocksCleared"}


def _hash_of(digest: bytes) -> int:
    """Returns the 64 bits by which routers name a block: the last ones of its digest."""
    return int.from_bytes(digest[-NUMBER_BYTES:], "big")


def _kind(group: KVGroup) -> tuple[str, int | None]:
    visibility = group.spec.visibility
    if isinstance(visibility, Window):
        return "sliding_window", visibility.size
    if isinstance(visibility, Chunk):
        return "chunked_local_attention", visibility.size
    return "full_attention", None


class EventPublisher:
    """The sockets and the thread that serves them. `publish` may be called from one thread."""

    def __init__(self, config: KVEventsConfig, encoder: EventEncoder) -> None:
        """Raises ConfigError if an endpoint cannot be used."""
        self.num_dropped = 0
        """Messages that found the queue full."""
        self._encoder = encoder
        self._topic = config.topic.encode()
        self._max_waiting = config.max_queue_size
        self._waiting: queue.SimpleQueue[tuple[int, float, list[Event]] | None] = (
            queue.SimpleQueue()
        )
        self._next_number = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.PUB)
        self._socket.set_hwm(config.hwm)
        self._replay: zmq.Socket[bytes] | None = None
        try:
            self.endpoint = _open(self._socket, "endpoint", config.own_endpoint)
            """Where events are to be had, the port that was taken in it."""
            self.replay_endpoint: str | None = None
            replay = config.own_replay_endpoint
            if replay is not None:
                self._replay = self._context.socket(zmq.ROUTER)
                self._replay.set_hwm(config.buffer_steps + 1)
                self.replay_endpoint = _open(self._replay, "replay_endpoint", replay, is_bound=True)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self._thread = threading.Thread(target=self._run, name="kv-events", daemon=True)
        self._thread.start()
        logger.info("events of the KV cache are published on %s", self.endpoint)

    def publish(self, events: list[Event]) -> None:
        """Hands a step's events over; returns at once."""
        number = self._next_number
        self._next_number += 1
        if self._waiting.qsize() >= self._max_waiting:
            self.num_dropped += 1
        else:
            self._waiting.put((number, time.time(), events))

    def _run(self) -> None:
        try:
            while True:
                try:
                    waiting = self._waiting.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    self._answer()
                    continue
                if waiting is None:
                    return
                self._send(*waiting)
                self._answer()
        except Exception:  # the edge of the thread: the engine goes on without it
            logger.exception("events of the KV cache are published no more")
        finally:
            self._context.destroy(linger=_LINGER_MILLISECONDS)

    def _send(self, number: int, seconds: float, events: list[Event]) -> None:
        name = number.to_bytes(NUMBER_BYTES, "big")
        payload = self._encoder.payload(seconds, events)
        self._kept.append((name, payload))
        # PUB never waits: what a subscriber has no room for, it misses.
        self._socket.send_multipart((self._topic, name, payload), zmq.NOBLOCK)

    def _answer(self) -> None:
        """Answers all that have asked for messages again."""
        replay = self._replay
        while replay is not None:
            try:
                frames = replay.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or frames[1] or len(frames[2]) != NUMBER_BYTES:
                logger.debug("a replay was asked for in a way that is not understood")
                continue
            asker, _, first = frames
            messages = [one for one in self._kept if one[0] >= first]
            for name, payload in (*messages, (END, b"")):
                replay.send_multipart((asker, b"", name, payload), zmq.NOBLOCK)

    def close(self) -> None:
        """Sends what waits and ends. May be called twice."""
        self._waiting.put(None)
        self._thread.join(_CLOSE_SECONDS)


def _open(socket: zmq.Socket[bytes], field: str, endpoint: str, *, is_bound: bool = False) -> str:
    """Binds or connects as the endpoint's form says; returns it as it came to be."""
    is_local = endpoint.startswith(("ipc://", "inproc://"))
    try:
        if is_bound or is_local or "*" in endpoint or "::" in endpoint:
            socket.bind(endpoint)
            return socket.get_string(zmq.LAST_ENDPOINT)
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        message = f"kv_events_config: {field} {endpoint!r} cannot be used: {error}"
        raise ConfigError(message, field="kv_events_config") from error
    return endpoint
