"""An ingress's side of the engine replicas: who is there, what they hold, and their streams.

The client of an AsyncLLM whose engines are deployments: which replica gets which request is decided
by the same `engine.fleet_link` as on one host. Knows of Ray only that it is spoken to by a handle.

    look      every LOOK_SECONDS: replicas join, leave, and tell what they hold
    a death   seen by the streams at once: what had not begun goes to another replica
    no word   of what is held: routed by load and by what was sent, which is said once
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from octavo.config import EngineConfig
from octavo.deploy.ray.messages import Kind, Look, decode_answer, decode_look, kind_of
from octavo.engine.fleet import least_plan
from octavo.engine.fleet_link import FleetLink, MemberOwner
from octavo.engine.ipc import Answer, Deltas, Explained, Held, Refused, decode_from_engine, encode
from octavo.engine.link import LinkOwner
from octavo.engine.prefixes import RequestHasher
from octavo.errors import ConfigError, EngineDeadError, OverloadedError
from octavo.kv_cache.explain import PrefixExplanation
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.request import Request
from octavo.weights.fingerprint import with_fingerprint
from octavo.weights.hub import ModelFiles

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
CALL_SECONDS = 10.0
"""What a replica gets to answer a question."""
OTHERS_SECONDS = 60.0
"""How long replicas that run something else are taken for those of the version before."""
SILENT_LOOKS = 20
"""Looks without an answer after which that is said."""


class Handle(Protocol):
    """What is asked of a handle of Ray Serve: `Calls` makes one of it."""

    async def look(self, numbers: dict[str, int]) -> list[bytes | BaseException]:
        """Returns what each replica answers, or why it does not."""
        ...

    def generate(self, name: str, data: bytes) -> Stream: ...

    async def call(self, method: str, name: str, *arguments: Any) -> Any: ...


class Stream(Protocol):
    """The messages of one request."""

    def __aiter__(self) -> Stream: ...

    async def __anext__(self) -> bytes: ...

    def cancel(self) -> None: ...


class ReplicaLink:
    """The link to one replica. `fleet` is told of what becomes of its requests."""

    prefix = ""  # the fleet's counts
    error: EngineDeadError | None = None

    def __init__(self, fleet: FleetLink, engine: int, name: str, handle: Handle) -> None:
        self.name = name
        self.engine = engine
        self._fleet = fleet
        self._owner = MemberOwner(fleet, engine)
        self._handle = handle
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def add(self, request: Request) -> None:
        task = asyncio.create_task(self._follow(request))
        self._tasks[request.request_id] = task

    async def _follow(self, request: Request) -> None:
        request_id = request.request_id
        task = asyncio.current_task()
        stream = self._handle.generate(self.name, encode(request))
        try:
            async for data in stream:
                message = decode_from_engine(data)
                if isinstance(message, Deltas):
                    self._owner.on_deltas(message)
                elif isinstance(message, Refused):
                    self._owner.on_failed(request_id, OverloadedError(message.message))
            self._fleet.on_lost(self.engine, request_id, _lost(self.name))  # unless it has ended
        except asyncio.CancelledError:
            stream.cancel()
            raise
        except Exception as error:  # the edge: whatever Ray says of a replica that is gone
            logger.warning("replica %s lost a request: %s", self.name, _first_line(error))
            self._fleet.leave(self.engine)  # until it answers a look again
            self._fleet.on_lost(self.engine, request_id, _lost(self.name))
        finally:
            if self._tasks.get(request_id) is task:
                del self._tasks[request_id]

    @property
    def is_busy(self) -> bool:
        return bool(self._tasks)

    def abort(self, request_id: str, index: int | None = None) -> None:
        if request_id not in self._tasks:
            return
        key = f"{request_id}/abort/{index}"
        task = asyncio.create_task(self._abort(request_id, index))
        task.add_done_callback(lambda _: self._tasks.pop(key, None))
        self._tasks[key] = task

    async def _abort(self, request_id: str, index: int | None) -> None:
        with contextlib.suppress(EngineDeadError):  # which its stream tells
            await self._ask("abort", request_id, index)

    async def stats(self, is_detailed: bool = False) -> EngineStats:
        value = decode_answer(await self._ask("stats", is_detailed), Answer).value
        assert isinstance(value, EngineStats)
        return value

    async def reset_prefix_cache(self) -> bool:
        return bool(decode_answer(await self._ask("reset_prefix_cache"), Answer).value)

    async def explain_prefix(self, request: Request) -> PrefixExplanation:
        return decode_answer(await self._ask("explain_prefix", encode(request)), Explained).value

    async def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(CALL_SECONDS):
                return await self._handle.call(method, self.name, *arguments)
        except Exception as error:
            text = f"replica {self.name} does not answer: {_first_line(error)}"
            raise EngineDeadError(text) from error

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()


class RayFleet:
    """The replicas, as the client of an AsyncLLM."""

    def __init__(self, owner: LinkOwner, handle: Handle) -> None:
        self.link = FleetLink(owner, 0, 0, is_lasting=True)
        # Ids of requests are told apart by replicas that many ingresses speak to.
        self.link.prefix = f"0-{secrets.token_hex(6)}-"
        self._handle = handle
        self._members: dict[str, ReplicaLink] = {}
        self._gone: list[ReplicaLink] = []
        self._numbers: dict[str, int] = {}
        self._refused: set[str] = set()
        self._max_len = 0
        self._num_silent = 0
        self._watcher: asyncio.Task[None] | None = None

    async def start(
        self, config: EngineConfig, files: ModelFiles, log_format: str, log_level: str
    ) -> MemoryPlan:
        """Waits for the first replica; returns what it can do. Raises ConfigError where all that
        come run another version or model."""
        files = await asyncio.to_thread(with_fingerprint, files)
        self._kind = kind_of(config, files)
        # In an update there are replicas before it, which may hold less, or more.
        self._max_len = config.max_model_len or 0
        looks = await self._first_looks()
        plan = least_plan([look.plan for look in looks])
        self._max_len = config.max_model_len or plan.max_model_len
        plan = replace(plan, max_model_len=self._max_len)
        self.link.prepare(RequestHasher(config, files, plan))
        self._learn(looks)
        self._watcher = asyncio.create_task(self._watch())
        return plan

    async def _first_looks(self) -> list[Look]:
        began = time.monotonic()
        while True:
            there = await self._look() or []
            if looks := self._of_kind(there):
                return looks
            # In an update the replicas before this ingress's own are still there for a while.
            if there and time.monotonic() - began > OTHERS_SECONDS:
                raise ConfigError(_refusal(there[0], self._kind, self._max_len))
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> list[Look] | None:
        """Returns what the replicas say that answer; None if it cannot be asked now."""
        try:
            async with asyncio.timeout(CALL_SECONDS):
                found = await self._handle.look(self._numbers)
        except Exception as error:
            self._num_silent += 1
            if self._num_silent == SILENT_LOOKS:
                logger.warning(
                    "the replicas have not told what they hold for %d looks (%s): requests go by "
                    "what was sent to them, and by load",
                    self._num_silent,
                    _first_line(error),
                )
            return None
        if self._num_silent >= SILENT_LOOKS:
            logger.warning("the replicas tell what they hold again")
        self._num_silent = 0
        return [decode_look(one) for one in found if isinstance(one, bytes)]

    def _of_kind(self, looks: Sequence[Look]) -> list[Look]:
        """Returns those that run what this ingress does, and logs of the others once."""
        found: list[Look] = []
        for look in looks:
            refusal = _refusal(look, self._kind, self._max_len)
            if not refusal:
                found.append(look)
            elif look.replica not in self._refused:
                self._refused.add(look.replica)
                logger.error("%s", refusal)
        return found

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            looks = await self._look()
            if looks is not None:
                self._learn(self._of_kind(looks))

    def _learn(self, looks: Sequence[Look]) -> None:
        there = {look.replica for look in looks}
        for name in self._members.keys() - there:
            self._leave(name)
        joined = set(self.link.engines)
        for look in looks:
            member = self._members.get(look.replica)
            if member is not None and member.engine not in joined:
                self._leave(look.replica)  # a stream was lost, and yet it lives: from the next
                continue  # look on it is as good as new
            if member is None:
                member = self._join(look)
            held = Held(look.num_open, look.stored, look.removed, look.is_whole)
            self.link.on_held(member.engine, held)
            self._numbers[look.replica] = look.number

    def _join(self, look: Look) -> ReplicaLink:
        taken = {member.engine for member in self._members.values()}
        engine = next(number for number in range(len(taken) + 1) if number not in taken)
        member = ReplicaLink(self.link, engine, look.replica, self._handle)
        self._members[look.replica] = member
        self.link.join(engine, member, look.plan, look.replica)
        logger.info("replica %s takes requests as engine %d", look.replica, engine)
        return member

    def _leave(self, name: str) -> None:
        member = self._members.pop(name)
        self._numbers.pop(name, None)
        self._gone = [one for one in (*self._gone, member) if one.is_busy]
        self.link.leave(member.engine)
        logger.info("replica %s takes no requests any more", name)

    def begin_drain(self) -> None:
        """The replicas are watched by Ray Serve."""

    def kill(self) -> None:
        """They are Ray Serve's."""

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        for member in (*self._members.values(), *self._gone):
            member.close()
        self.link.die(EngineDeadError("the ingress is closed"))


def _refusal(look: Look, wanted: Kind, max_len: int) -> str:
    """Returns why a replica gets no requests of an ingress; empty if it does."""
    if look.kind == wanted and look.plan.max_model_len >= max_len:
        return ""
    if look.kind == wanted:
        return (
            f"replica {look.replica} is not of this fleet: its context holds "
            f"{look.plan.max_model_len} tokens, this ingress takes {max_len}; set max_model_len to "
            "what all can do"
        )
    return (
        f"replica {look.replica} is not of this fleet: it runs {look.kind}, this ingress {wanted}; "
        "deploy all of an app with the same packages and the same model"
    )


def _lost(name: str) -> EngineDeadError:
    return EngineDeadError(f"the engine replica {name} died under the request; send it again")


def _first_line(error: BaseException) -> str:
    """Returns what an error is, without the stacks that Ray's carry."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
