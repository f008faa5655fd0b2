"""An ingress's side of engine replicas: who joins, who is refused, and what becomes of requests.

The replicas are played; no Ray is needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from octavo import EngineConfig
from octavo.deploy.ray import fleet as module
from octavo.deploy.ray.fleet import RayFleet
from octavo.deploy.ray.messages import Kind, Look, kind_of, moved
from octavo.engine.ipc import Answer, Deltas, encode
from octavo.errors import ConfigError, EngineDeadError, OctavoError
from octavo.kv_cache.planner import MemoryPlan
from octavo.observe.stats import EngineStats
from octavo.request import FinishReason, Request, SamplingParams, TokenDelta, pack_ids
from octavo.weights.hub import ModelFiles
from tests.engine.memory_plans import PLAN

CONFIG = EngineConfig(model="m")
FILES = ModelFiles(
    name="m", kind="config", path=Path("m"), config={}, generation_config={}, identity="weights"
)
KIND = kind_of(CONFIG, FILES)
DONE = object()


class FakeStream:
    def __init__(self) -> None:
        self.items: asyncio.Queue[Any] = asyncio.Queue()
        self.is_cancelled = False

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> bytes:
        item = await self.items.get()
        if item is DONE:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.is_cancelled = True


class Replicas:
    """As `fleet.Handle`: replicas by name, and the streams that they were asked for."""

    def __init__(self, *names: str) -> None:
        self.kinds = dict.fromkeys(names, KIND)
        self.plans: dict[str, MemoryPlan] = {}
        self.streams: list[tuple[str, FakeStream]] = []
        self.calls: list[tuple[str, str, Any]] = []
        self.error: Exception | None = None

    async def look(self, numbers: dict[str, int]) -> list[bytes | BaseException]:
        if self.error is not None:
            raise self.error
        looks = [
            Look(
                replica=name, kind=kind, plan=self.plans.get(name, PLAN), num_open=0, number=1,
                is_whole=name not in numbers, stored=b"", removed=b"",
            )
            for name, kind in self.kinds.items()
        ]  # fmt: skip
        return [*(encode(look) for look in looks), RuntimeError("one that is dying")]

    def generate(self, name: str, data: bytes) -> FakeStream:
        stream = FakeStream()
        self.streams.append((name, stream))
        return stream

    async def call(self, method: str, name: str, *arguments: Any) -> Any:
        self.calls.append((method, name, arguments[:1]))
        if name not in self.kinds:
            raise RuntimeError("gone")
        return encode(Answer(0, EngineStats(num_running=1)))


class Owner:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.failed: dict[str, OctavoError] = {}

    def on_deltas(self, message: Deltas) -> None:
        self.deltas += message.deltas

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        assert request_id not in self.failed
        self.failed[request_id] = error

    def on_death(self, error: EngineDeadError) -> None:
        pass


def request(fleet: RayFleet, number: int) -> Request:
    return Request(
        request_id=f"{fleet.link.prefix}{number}",
        packed_prompt=pack_ids([*range(60), number]),
        params=SamplingParams(),
    )


def told(request: Request, *, is_last: bool) -> bytes:
    reason = FinishReason.STOP if is_last else None
    delta = TokenDelta(request_id=request.request_id, index=0, token_ids=(1,), finish_reason=reason)
    return encode(Deltas([delta]))


async def until(is_so: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "OTHERS_SECONDS", 0.05)


@pytest.fixture
async def started() -> AsyncIterator[Callable[..., Any]]:
    fleets: list[RayFleet] = []

    async def start(*names: str) -> tuple[RayFleet, Replicas, Owner]:
        owner, replicas = Owner(), Replicas(*names)
        fleet = RayFleet(owner, replicas)
        fleets.append(fleet)
        await fleet.start(CONFIG, FILES, "text", "info")
        return fleet, replicas, owner

    yield start
    for fleet in fleets:
        await fleet.close()


async def test_replicas_join_and_leave_as_they_are_seen(started: Any) -> None:
    fleet, replicas, _ = await started("a")
    assert len(fleet.link.engines) == 1
    replicas.kinds["b"] = KIND
    await until(lambda: len(fleet.link.engines) == 2)
    del replicas.kinds["a"]
    await until(lambda: len(fleet.link.engines) == 1)
    fleet.link.add(request(fleet, 1))
    await until(lambda: replicas.streams)
    assert replicas.streams[0][0] == "b"
    stats = await fleet.link.stats()
    assert stats.num_running == 1
    replicas.kinds.clear()
    await until(lambda: not fleet.link.engines)
    with pytest.raises(EngineDeadError, match="no engine"):
        fleet.link.add(request(fleet, 2))


async def test_what_has_not_begun_goes_elsewhere_and_what_has_fails(started: Any) -> None:
    fleet, replicas, owner = await started("a", "b")
    first, second = request(fleet, 1), request(fleet, 2)
    fleet.link.add(first)
    await until(lambda: len(replicas.streams) == 1)
    name, stream = replicas.streams[0]
    stream.items.put_nowait(RuntimeError("The actor died.\nand its stack"))
    await until(lambda: len(replicas.streams) == 2)
    other, stream = replicas.streams[1]
    assert {name, other} == {"a", "b"}
    stream.items.put_nowait(told(first, is_last=False))
    await until(lambda: owner.deltas)
    stream.items.put_nowait(RuntimeError("this one, too"))
    await until(lambda: owner.failed)
    assert f"replica {other} died" in str(owner.failed[first.request_id])
    await until(lambda: len(fleet.link.engines) == 2)  # they answer looks: as good as new
    fleet.link.add(second)
    await until(lambda: len(replicas.streams) == 3)
    _, stream = replicas.streams[2]
    stream.items.put_nowait(told(second, is_last=True))
    stream.items.put_nowait(DONE)
    await until(lambda: len(owner.deltas) == 2)
    assert second.request_id not in owner.failed
    assert not fleet.link._open


async def test_a_replica_that_has_moved_passes_a_request_on(started: Any) -> None:
    fleet, replicas, owner = await started("a", "b")
    asked = request(fleet, 1)
    fleet.link.add(asked)
    await until(lambda: len(replicas.streams) == 1)
    replicas.streams[0][1].items.put_nowait(moved(asked.request_id))
    replicas.streams[0][1].items.put_nowait(DONE)
    await until(lambda: len(replicas.streams) == 2)
    assert {name for name, _ in replicas.streams} == {"a", "b"}
    assert not owner.failed


async def test_a_stream_that_ends_before_its_request_is_a_loss(started: Any) -> None:
    fleet, replicas, owner = await started("a")
    asked = request(fleet, 1)
    fleet.link.add(asked)
    await until(lambda: replicas.streams)
    replicas.streams[0][1].items.put_nowait(DONE)
    await until(lambda: owner.failed)
    assert isinstance(owner.failed[asked.request_id], EngineDeadError)


async def test_an_abort_goes_to_the_replica_that_has_the_request(started: Any) -> None:
    fleet, replicas, _ = await started("a", "b")
    asked = request(fleet, 1)
    fleet.link.add(asked)
    await until(lambda: replicas.streams)
    fleet.link.abort(asked.request_id, 0)
    await until(lambda: replicas.calls)
    assert replicas.calls == [("abort", replicas.streams[0][0], (asked.request_id,))]


async def test_another_kind_of_replica_is_refused(
    started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, replicas, _ = await started("a")
    replicas.kinds["b"] = Kind(version="0.0.1", model="m", weights=KIND.weights)
    await until(lambda: "replica b is not of this fleet" in caplog.text)
    assert f"it runs Octavo 0.0.1 with m ({KIND.weights[:12]}), this ingress {KIND}" in caplog.text
    await asyncio.sleep(0.05)
    assert caplog.text.count("is not of this fleet") == 1
    assert len(fleet.link.engines) == 1


async def test_a_replica_with_less_context_gets_no_requests(
    started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, replicas, _ = await started("a")
    replicas.plans["b"] = replace(PLAN, max_model_len=PLAN.max_model_len - 1)
    replicas.kinds["b"] = KIND
    await until(lambda: "its context holds 99 tokens, this ingress takes 100" in caplog.text)
    replicas.plans["c"] = replace(PLAN, max_model_len=PLAN.max_model_len + 1)
    replicas.kinds["c"] = KIND
    await until(lambda: len(fleet.link.engines) == 2)


async def test_where_all_are_of_another_kind_it_does_not_start() -> None:
    owner, replicas = Owner(), Replicas("a")
    replicas.kinds["a"] = Kind(version=KIND.version, model="other", weights="w")
    with pytest.raises(ConfigError, match=r"replica a is not of this fleet: it runs .* with other"):
        await RayFleet(owner, replicas).start(CONFIG, FILES, "text", "info")


async def test_without_news_requests_go_on_and_it_is_said(
    started: Any, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, replicas, _ = await started("a", "b")
    replicas.error = TimeoutError("nobody answers")
    await until(lambda: "have not told what they hold" in caplog.text)
    assert "by what was sent to them, and by load" in caplog.text
    fleet.link.add(request(fleet, 1))
    await until(lambda: replicas.streams)
    replicas.error = None
    await until(lambda: "tell what they hold again" in caplog.text)
