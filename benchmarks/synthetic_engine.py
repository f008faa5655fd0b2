"""An engine process that computes nothing: a step is one random token of every open request.

Run in place of `octavo.engine.process` by `front_scaling.py`: the front is what is measured.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import msgspec
import zmq

from octavo.engine import load
from octavo.engine.ipc import (
    AbortSequence,
    AddRequest,
    Answer,
    GetStats,
    Ready,
    Shutdown,
    decode_to_engine,
)
from octavo.engine.process import EngineArguments, Fronts, front_of
from octavo.engine.vitals import Vitals
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.parallel import ALONE
from octavo.request import FinishReason, Request, TokenDelta

STEP_SECONDS = 0.004


def main(arguments: str, beats: str, stacks: str, *addresses: str) -> int:
    """As `octavo.engine.process.main`."""
    vitals = Vitals(int(beats), int(stacks))
    with open(int(arguments), "rb") as file:
        given = msgspec.msgpack.decode(
            file.read(), type=EngineArguments, dec_hook=lambda kind, value: Path(value)
        )
    context = zmq.Context()
    inbox = context.socket(zmq.PULL)
    for address in addresses[::2]:
        inbox.connect(address)
    outboxes = [context.socket(zmq.PUSH) for _ in addresses[1::2]]
    for outbox, address in zip(outboxes, addresses[1::2], strict=True):
        outbox.set_hwm(0)
        outbox.connect(address)
    fronts = Fronts(outboxes)
    fronts.send_all(Ready(_plan(given)))
    _run(inbox, fronts, vitals)
    context.destroy(linger=1000)
    return 0


def _plan(given: EngineArguments) -> MemoryPlan:
    found: list[MemoryPlan] = []

    def build(config: Any, spec: Any, family: Any, source: Any, plan_with: Any, *_: Any) -> Any:
        found.append(plan_with())
        return None, found[0]

    load.build_runner = build  # type: ignore[assignment]
    load.load_runner(given.config, given.files, ALONE)
    return found[0]


def _run(inbox: zmq.Socket[bytes], fronts: Fronts, vitals: Vitals) -> None:
    open_requests: dict[str, tuple[Request, int]] = {}
    draw = random.Random(0)
    while True:
        began = time.perf_counter()
        vitals.beat()
        if not open_requests:
            inbox.poll(500)
        while True:
            try:
                message = decode_to_engine(inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                break
            match message:
                case AddRequest(request):
                    open_requests[request.request_id] = (request, 0)
                case AbortSequence(request_id):
                    open_requests.pop(request_id, None)
                case GetStats(call_id, front):
                    fronts.send(front, Answer(call_id, EngineStats()))
                case Shutdown():
                    return
        tokens = {front: (draw.randrange(300, 40000),) for front in range(8)}
        deltas = []
        for request_id, (request, count) in list(open_requests.items()):
            finished = count + 1 >= (request.params.max_tokens or 1)
            if finished:
                del open_requests[request_id]
            else:
                open_requests[request_id] = (request, count + 1)
            deltas.append(
                TokenDelta(
                    request_id=request_id,
                    index=0,
                    token_ids=tokens[front_of(request_id) % 8],
                    finish_reason=FinishReason.LENGTH if finished else None,
                    scheduled_time=began,
                )
            )
        if deltas:
            fronts.tell(deltas)
        # As a device would: no faster than this, however few there are.
        time.sleep(max(0.0, STEP_SECONDS - (time.perf_counter() - began)))
