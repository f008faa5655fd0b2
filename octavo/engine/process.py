"""The engine in a process of its own: `main` is run by `engine.parent`.

Started by `engine.client`. Reads requests from one socket, steps, writes deltas to the other, so
that HTTP never waits for a step. Ends when told to or with a Died message that carries the reason;
`engine.parent` ends it when its parent is gone.
"""

from __future__ import annotations

import gc
import logging

import msgspec
import zmq

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.ipc import (
    AbortSequence,
    AddRequest,
    Answer,
    Deltas,
    Died,
    GetStats,
    Ready,
    Refused,
    ResetPrefixCache,
    Shutdown,
    decode_to_engine,
    encode,
)
from octavo.engine.load import load_core
from octavo.engine.vitals import Vitals
from octavo.errors import OctavoError, OverloadedError
from octavo.observe.logs import LogFormat, configure_logging
from octavo.weights.hub import ModelFiles

IDLE_POLL_MILLISECONDS = 1000


class EngineArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent hands over at start, in a file without a name."""

    config: EngineConfig
    files: ModelFiles
    log_format: LogFormat
    log_level: str


class _Loop:
    """Alternates between the inbox and a step until it is told to stop."""

    def __init__(
        self,
        core: EngineCore,
        inbox: zmq.Socket[bytes],
        outbox: zmq.Socket[bytes],
        vitals: Vitals,
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._outbox = outbox
        self._vitals = vitals
        self._is_running = True

    def run(self) -> None:
        while self._is_running:
            self._vitals.beat()
            if not self._core.has_work and not self._inbox.poll(IDLE_POLL_MILLISECONDS):
                continue
            self._read_inbox()
            deltas = self._core.step()
            if deltas:
                self._outbox.send(encode(Deltas(deltas)))

    def _read_inbox(self) -> None:
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._vitals.beat()
            self._handle(data)

    def _handle(self, data: bytes) -> None:
        core, reply = self._core, None
        message = decode_to_engine(data)
        match message:
            case AddRequest(request):
                try:
                    core.add(request)
                except OverloadedError as error:
                    reply = Refused(request.request_id, str(error))
            case AbortSequence(request_id, index):
                core.abort(request_id, index)
            case GetStats(call_id):
                reply = Answer(call_id, core.stats())
            case ResetPrefixCache(call_id):
                reply = Answer(call_id, core.reset_prefix_cache())
            case Shutdown():
                self._is_running = False
        if reply is not None:
            self._outbox.send(encode(reply))


def main(arguments: str, beats: str, stacks: str, inbox_address: str, outbox_address: str) -> int:
    """Runs until told to stop; returns the exit code. The first three are descriptors."""
    vitals = Vitals(int(beats), int(stacks))
    vitals.catch_stacks()
    with open(int(arguments), "rb") as file:
        given = msgspec.msgpack.decode(
            file.read(),
            type=EngineArguments,
            dec_hook=lambda kind, value: kind(value),  # pathlib.Path travels as text
        )
    configure_logging(given.log_format, given.log_level, owns_stderr=True)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    inbox.set_hwm(0)
    outbox.set_hwm(0)
    inbox.connect(inbox_address)
    outbox.connect(outbox_address)
    try:
        core = load_core(given.config, given.files, vitals)
        # What is loaded lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        outbox.send(encode(Ready(core.plan)))
        _Loop(core, inbox, outbox, vitals).run()
        core.close()
    except Exception as error:  # the edge of the process
        kind = type(error).__name__ if isinstance(error, OctavoError) else ""
        if not kind:
            logging.getLogger(__name__).exception("the engine process ends")
        outbox.send(encode(Died(kind, str(error) if kind else f"{type(error).__name__}: {error}")))
        return 1
    finally:
        context.destroy(linger=2000)
    return 0
