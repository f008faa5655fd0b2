"""Sockets of those who listen to events of the KV cache."""

from __future__ import annotations

from typing import Any

import msgspec
import zmq

from octavo.engine.kv_events import END

TIMEOUT_MILLISECONDS = 20_000


class Sockets:
    """Those of one test, closed at its end."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def socket(self, kind: int) -> zmq.Socket[bytes]:
        self._sockets.append(self._context.socket(kind))
        return self._sockets[-1]

    def close(self) -> None:
        self._context.destroy(linger=0)


def replayed(context: Sockets, endpoint: str, first: int) -> list[tuple[int, list[Any]]]:
    """Asks for messages again, as vLLM's subscribers do."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVTIMEO, TIMEOUT_MILLISECONDS)
    dealer.connect(endpoint)
    dealer.send_multipart((b"", first.to_bytes(8, "big")))
    found = []
    while True:
        _, number, payload = dealer.recv_multipart()
        if number == END:
            assert payload == b""
            return found
        found.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))
