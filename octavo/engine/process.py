"""The engine in a process of its own: `main` is run by `engine.parent`.

Started by `engine.client`. Reads requests from one socket, steps, writes deltas to the other, so
that HTTP never waits for a step. Ends when told to or with a Died message that carries the reason;
`engine.parent` ends it when its parent is gone.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import msgspec
import zmq

from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.engine.child import address_of, told
from octavo.engine.core import EngineCore
from octavo.engine.ipc import (
    AbortSequence,
    AddRequests,
    Answer,
    AwaitRanks,
    Deltas,
    Died,
    Explained,
    ExplainPrefix,
    FromEngine,
    GetStats,
    Held,
    Ready,
    Refused,
    ResetPrefixCache,
    Shutdown,
    decode_request,
    decode_to_engine,
    encode,
)
from octavo.engine.load import load_core
from octavo.engine.rank_transport import RankTransport, RemoteRanks
from octavo.engine.vitals import Vitals
from octavo.errors import OctavoError, OverloadedError
from octavo.observe.logs import LogFormat, configure_logging
from octavo.request import Request, TokenDelta
from octavo.weights.hub import ModelFiles

IDLE_POLL_MILLISECONDS = 1000
GC_OBJECTS = 20_000


class EngineArguments(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent tells, once it knows which model it is: meanwhile this process has imported
    what it needs."""

    config: EngineConfig
    files: ModelFiles
    log_format: LogFormat
    log_level: str
    addresses: Sequence[str] = ()
    """Two of sockets for each front end, of what is read and of what is written; none where
    descriptors of the sockets were passed on."""
    first_device: int = 0
    """Of the GPUs of its ranks."""
    is_in_fleet: bool = False
    """Whether it tells its front ends what it holds."""
    rank_host: str | None = None
    """An address of this host that its ranks come to, if somebody else starts them."""


class _Loop:
    """Alternates between the inbox and a step until it is told to stop."""

    def __init__(
        self,
        core: EngineCore,
        inbox: zmq.Socket[bytes],
        fronts: Fronts,
        vitals: Vitals,
    ) -> None:
        self._core = core
        self._inbox = inbox
        self._fronts = fronts
        self._vitals = vitals
        self._is_in_fleet = core.is_in_fleet
        self._num_told = 0
        self._is_running = True

    def run(self) -> None:
        while self._is_running:
            self._vitals.beat()
            if not self._core.has_work and not self._inbox.poll(IDLE_POLL_MILLISECONDS):
                continue
            self._read_inbox()
            deltas = self._core.step()
            if self._is_in_fleet:
                self._tell_held()
            if deltas:
                self._fronts.tell(deltas)

    def _tell_held(self) -> None:
        """Before the deltas of the step: who reads those knows what can be asked for again."""
        changes, num_open = self._core.take_changes(), self._core.num_open
        if changes is None and num_open == self._num_told:
            return
        self._num_told = num_open
        if changes is None:
            self._fronts.send_all(Held(num_open))
        else:
            held = Held(num_open, changes.stored, changes.removed, changes.is_cleared)
            self._fronts.send_all(held)

    def _read_inbox(self) -> None:
        while True:
            try:
                data = self._inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._vitals.beat()
            self._handle(data)

    def _handle(self, data: bytes) -> None:
        core, fronts = self._core, self._fronts
        message = decode_to_engine(data)
        match message:
            case AddRequests(requests):
                for data in requests:
                    self._add(decode_request(data))
            case AbortSequence(request_id, index):
                core.abort(request_id, index)
            case GetStats(call_id, front, is_detailed):
                fronts.send(front, Answer(call_id, core.stats(is_detailed)))
            case ResetPrefixCache(call_id, front):
                fronts.send(front, Answer(call_id, core.reset_prefix_cache()))
            case ExplainPrefix(call_id, request, front):
                fronts.send(front, Explained(call_id, core.explain_prefix(request)))
            case Shutdown():
                self._is_running = False

    def _add(self, request: Request) -> None:
        try:
            self._core.add(request)
        except OverloadedError as error:
            refused = Refused(request.request_id, str(error))
            self._fronts.send(front_of(request.request_id), refused)


def front_of(request_id: str) -> int:
    """Returns the number of the front end whose request it is: `EngineLink.prefix` says it."""
    return int(request_id.partition("-")[0])


class Fronts:
    """The sockets to the front ends, by number."""

    def __init__(self, sockets: Sequence[zmq.Socket[bytes]]) -> None:
        self._sockets = sockets

    def send(self, front: int, message: FromEngine) -> None:
        self._sockets[front].send(encode(message))

    def send_all(self, message: FromEngine) -> None:
        data = encode(message)
        for socket in self._sockets:
            socket.send(data)

    def tell(self, deltas: list[TokenDelta]) -> None:
        """Tells every front end of its own requests."""
        if len(self._sockets) == 1:
            self.send(0, Deltas(deltas))
            return
        parts: dict[int, list[TokenDelta]] = {}
        for delta in deltas:
            parts.setdefault(front_of(delta.request_id), []).append(delta)
        for front, part in parts.items():
            self.send(front, Deltas(part))


def main(channel: str) -> int:
    """Runs until told to stop; returns the exit code. The descriptor says what comes of the parent:
    EngineArguments, and descriptors of vitals and sockets."""
    data, descriptors = told(int(channel))
    if not data:
        return 0
    given = msgspec.msgpack.decode(
        data,
        type=EngineArguments,
        dec_hook=lambda kind, value: kind(value),  # pathlib.Path travels as text
    )
    vitals = Vitals(*descriptors[:2])
    vitals.catch_stacks()
    addresses = given.addresses or [address_of(one) for one in descriptors[2:]]
    configure_logging(given.log_format, given.log_level, owns_stderr=True)
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    inbox.set_hwm(0)
    for address in addresses[::2]:
        inbox.connect(address)
    fronts = Fronts([_connected(context, address) for address in addresses[1::2]])
    try:
        core = load_core(
            given.config,
            given.files,
            vitals,
            first_device=given.first_device,
            transport=_transport(given, fronts),
            is_in_fleet=given.is_in_fleet,
        )
        # What is loaded lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        # A step of a thousand sequences makes as many objects, which live until they are sent: by
        # the usual count every step would have them looked through, and all sequences now and then.
        gc.set_threshold(GC_OBJECTS, 20, 20)
        # On a CPU whoever wants no grammar is spared the memory, and who does waits a moment once.
        is_host = select_device(given.config.device).name == "cpu"
        if not given.config.skip_tokenizer_init and not is_host:
            core.warm_up()
        fronts.send_all(Ready(core.plan))
        _Loop(core, inbox, fronts, vitals).run()
        core.close()
    except Exception as error:  # the edge of the process
        kind = type(error).__name__ if isinstance(error, OctavoError) else ""
        if not kind:
            logging.getLogger(__name__).exception("the engine process ends")
        fronts.send_all(Died(kind, str(error) if kind else f"{type(error).__name__}: {error}"))
        return 1
    finally:
        context.destroy(linger=2000)
    return 0


def _transport(given: EngineArguments, fronts: Fronts) -> RankTransport | None:
    """Returns how ranks are started if not by this process: the first front end sees to it."""
    if given.rank_host is None:
        return None
    return RemoteRanks(
        given.rank_host, lambda address, key: fronts.send(0, AwaitRanks(address, key))
    )


def _connected(context: zmq.Context[zmq.Socket[bytes]], address: str) -> zmq.Socket[bytes]:
    socket = context.socket(zmq.PUSH)
    socket.set_hwm(0)
    socket.connect(address)
    return socket
