"""An engine process that computes nothing: a step is one random token of every open request.

Run in place of `octavo.engine.process` by `front_scaling.py`: the front is what is measured.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import zmq

from octavo.engine import load
from octavo.engine.child import address_of, told
from octavo.engine.ipc import (
    AbortSequence,
    AddRequests,
    Answer,
    GetStats,
    Ready,
    Shutdown,
    decode_request,
    decode_to_engine,
)
from octavo.engine.process import EngineArguments, Fronts, front_of
from octavo.engine.vitals import Vitals
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.parallel import ALONE
from octavo.request import FinishReason, Request, TokenDelta

STEP_SECONDS = float(os.environ.get("STEP_MS", "4")) / 1000
PROMPT_TOKENS = 2048
"""That a step computes: requests start and end in different steps, as in an engine."""


def main(channel: str) -> int:
    """As `octavo.engine.process.main`."""
    data, descriptors = told(int(channel))
    if not data:
        return 0
    given = msgspec.msgpack.decode(
        data, type=EngineArguments, dec_hook=lambda kind, value: Path(value)
    )
    vitals = Vitals(*descriptors[:2])
    addresses = given.addresses or [address_of(one) for one in descriptors[2:]]
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    for address in addresses[::2]:
        inbox.connect(address)
    outboxes = [context.socket(zmq.PUSH) for _ in addresses[1::2]]
    for outbox, address in zip(outboxes, addresses[1::2], strict=True):
        outbox.set_hwm(0)
        outbox.connect(address)
    fronts = Fronts(outboxes)
    fronts.send_all(Ready(plan_of(given)))
    _run(inbox, fronts, vitals)
    context.destroy(linger=1000)
    return 0


def plan_of(given: EngineArguments) -> MemoryPlan:
    found: list[MemoryPlan] = []

    def build(config: Any, spec: Any, family: Any, source: Any, plan_with: Any, *_: Any) -> Any:
        found.append(plan_with())
        return None, found[0]

    load.build_runner = build  # type: ignore[assignment]
    load.load_runner(given.config, given.files, ALONE)
    return found[0]


class Requests:
    """What is open: requests whose prompts wait, and those that gain a token a step."""

    def __init__(self) -> None:
        self._waiting: deque[Request] = deque()
        self._running: dict[str, tuple[Request, int]] = {}
        self._draw = random.Random(0)

    def __bool__(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)
        self._waiting = deque(one for one in self._waiting if one.request_id != request_id)

    def step(self, now: float) -> list[TokenDelta]:
        """Returns a token of every request that runs, after some have begun to."""
        room = PROMPT_TOKENS
        while self._waiting and (room > 0 or not self._running):
            request = self._waiting.popleft()
            room -= request.prompt_len
            self._running[request.request_id] = (request, 0)
        tokens = {front: (self._draw.randrange(300, 40000),) for front in range(8)}
        deltas = []
        for request_id, (request, count) in list(self._running.items()):
            finished = count + 1 >= (request.params.max_tokens or 1)
            if finished:
                del self._running[request_id]
            else:
                self._running[request_id] = (request, count + 1)
            deltas.append(
                TokenDelta(
                    request_id=request_id,
                    index=0,
                    token_ids=tokens[front_of(request_id) % 8],
                    finish_reason=FinishReason.LENGTH if finished else None,
                    scheduled_time=now if count == 0 else None,
                )
            )
        return deltas


class Arrivals:
    """When messages with requests came, and the CPU time of the front by then: told to a file when
    nothing is left to do."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)
        self._num_messages = 0
        # Linux's name for the CPU clock of a process: here of the one front.
        self._clock = (~os.getppid() << 3) | 2

    def note(self) -> None:
        if self._path is not None:
            self._last = (time.monotonic(), time.clock_gettime(self._clock))
            self._first = self._first or self._last
            self._num_messages += 1

    def tell(self) -> None:
        if self._first is not None and self._path is not None:
            names = ("first", "first_cpu", "last", "last_cpu")
            line = dict(zip(names, (*self._first, *self._last), strict=True))
            with open(self._path, "a") as file:
                print(json.dumps(line | {"messages": self._num_messages}), file=file)
        self._first, self._num_messages = None, 0


def _run(inbox: zmq.Socket[bytes], fronts: Fronts, vitals: Vitals) -> None:
    requests, arrivals = Requests(), Arrivals(os.environ.get("ARRIVALS"))
    while True:
        began = time.perf_counter()
        vitals.beat()
        if not requests:
            arrivals.tell()
            inbox.poll(500)
        while True:
            try:
                message = decode_to_engine(inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            match message:
                case AddRequests(several):
                    arrivals.note()
                    for data in several:
                        requests.add(decode_request(data))
                case AbortSequence(request_id):
                    requests.abort(request_id)
                case GetStats(call_id, front):
                    fronts.send(front, Answer(call_id, EngineStats()))
                case Shutdown():
                    return
        deltas = requests.step(time.monotonic())
        if deltas:
            fronts.tell(deltas)
        # As a device would: no faster than this, however few there are.
        time.sleep(max(0.0, STEP_SECONDS - (time.perf_counter() - began)))
