"""What becomes of requests when engines of a fleet refuse, die and come back; no process runs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest

from octavo.config import EngineConfig
from octavo.engine.fleet_link import FleetLink, MemberOwner
from octavo.engine.ipc import Deltas, Held
from octavo.engine.link import EngineLink
from octavo.engine.prefixes import RequestHasher
from octavo.errors import EngineDeadError, OctavoError, OverloadedError
from octavo.request import FinishReason, Request, SamplingParams, TokenDelta, pack_ids
from octavo.weights.hub import ModelFiles
from tests.engine.memory_plans import PLAN


class Hasher:
    block_size = 16
    is_off = False

    def hashes(self, request: Request) -> list[int]:
        return [hash(request.packed_prompt[: 64 * i]) for i in range(1, request.prompt_len // 16)]


class FakeLink:
    """One engine, as far as its link goes."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.aborted: list[str] = []
        self.is_dead = False

    def add(self, request: Request) -> None:
        if self.is_dead:
            raise EngineDeadError("gone")
        self.sent.append(request.request_id)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborted.append(request_id)


class Front:
    """Owns the fleet's link, as AsyncLLM does, and plays the engines."""

    def __init__(self, size: int = 2, is_lasting: bool = False) -> None:
        self.deltas: list[TokenDelta] = []
        self.failed: dict[str, OctavoError] = {}
        self.death: EngineDeadError | None = None
        self.fleet = FleetLink(self, 0, size, is_lasting=is_lasting)
        self.fleet.prepare(cast("RequestHasher", Hasher()))
        self.engines: dict[int, FakeLink] = {}
        self.owners = [MemberOwner(self.fleet, engine) for engine in range(size)]
        for engine in range(size):
            self.start(engine)

    def start(self, engine: int) -> None:
        self.engines[engine] = FakeLink()
        self.fleet.join(engine, cast("EngineLink", self.engines[engine]), PLAN)

    def kill(self, engine: int) -> None:
        self.engines.pop(engine).is_dead = True
        self.owners[engine].on_death(EngineDeadError("it was killed"))

    def on_deltas(self, message: Deltas) -> None:
        self.deltas += message.deltas

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        assert request_id not in self.failed
        self.failed[request_id] = error

    def on_death(self, error: EngineDeadError) -> None:
        self.death = error

    def has(self, request_id: str) -> list[int]:
        return [one for one, link in self.engines.items() if request_id in link.sent]

    def tell(self, engine: int, request_id: str, **more: Any) -> None:
        self.owners[engine].on_deltas(Deltas([TokenDelta(request_id=request_id, index=0, **more)]))


def request(number: int, start: int = 0, n: int = 1) -> Request:
    ids = [start, *range(60), number]
    return Request(
        request_id=f"0-{number}", packed_prompt=pack_ids(ids), params=SamplingParams(n=n)
    )


def test_a_prefix_goes_where_it_was_sent() -> None:
    front = Front()
    for number in range(6):
        front.fleet.add(request(number))
        front.tell(front.has(f"0-{number}")[0], f"0-{number}", finish_reason=FinishReason.STOP)
    assert sorted(len(link.sent) for link in front.engines.values()) == [0, 6]


def test_without_prefixes_requests_go_by_load_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = ModelFiles(
        name="m", kind="config", path=tmp_path, config={}, generation_config={}, identity="m"
    )
    front = Front()
    front.fleet = FleetLink(front, 0, 2)
    front.fleet.prepare(RequestHasher(EngineConfig(model="m", prefix_caching="off"), files, PLAN))
    for engine in range(2):
        front.start(engine)
    for number in range(6):
        front.fleet.add(request(number))
    assert [len(link.sent) for link in front.engines.values()] == [3, 3]
    assert "prefix_caching is off: requests go where the load is least" in caplog.text


def test_what_has_not_begun_goes_elsewhere_and_what_has_begun_fails() -> None:
    front = Front()
    front.fleet.add(request(1))
    front.fleet.add(request(2))
    (engine,) = front.has("0-1")
    assert front.has("0-2") == [engine]
    front.tell(engine, "0-1", token_ids=(5,))
    front.kill(engine)
    assert front.has("0-2") == [1 - engine]
    assert list(front.failed) == ["0-1"]
    assert f"engine {engine} of 2: it was killed" in str(front.failed["0-1"])
    assert front.death is None
    front.start(engine)
    assert sorted(front.fleet.engines) == [0, 1]


def test_what_is_aborted_is_not_computed_elsewhere() -> None:
    front = Front()
    front.fleet.add(request(1))
    (engine,) = front.has("0-1")
    front.fleet.abort("0-1")
    assert front.engines[engine].aborted == ["0-1"]
    front.kill(engine)
    assert front.has("0-1") == []
    assert list(front.failed) == ["0-1"]


def test_a_full_engine_passes_a_request_on_until_all_are_full() -> None:
    front = Front(3)
    front.fleet.add(request(1))
    for _ in range(3):
        assert not front.failed
        engine = next(one for one in front.has("0-1"))
        front.engines[engine].sent.remove("0-1")
        front.owners[engine].on_failed("0-1", OverloadedError("full"))
    assert isinstance(front.failed["0-1"], OverloadedError)
    assert not front.has("0-1")


def test_an_engine_that_is_gone_before_anybody_knows_is_passed_over() -> None:
    front = Front()
    front.fleet.add(request(1))
    (engine,) = front.has("0-1")
    front.engines[engine].is_dead = True
    front.fleet.add(request(2))
    assert front.has("0-2") == [1 - engine]
    front.engines[1 - engine].is_dead = True
    with pytest.raises(EngineDeadError, match="no engine"):
        front.fleet.add(request(3))


def test_the_last_death_is_the_end() -> None:
    front = Front()
    front.kill(0)
    front.kill(1)
    assert "engine 1, the last of 2: it was killed" in str(front.death)
    with pytest.raises(EngineDeadError, match="last of 2"):
        front.fleet.add(request(1))


def test_a_request_that_engines_die_of_is_not_sent_to_all_of_them() -> None:
    front = Front(4)
    front.fleet.add(request(1))
    for _ in range(2):
        assert not front.failed
        front.kill(*front.has("0-1"))
    assert not front.has("0-1")
    assert "it was killed" in str(front.failed["0-1"])
    assert len(front.engines) == 2


def test_an_engine_that_leaves_ends_what_it_has() -> None:
    front = Front()
    front.fleet.add(request(1))
    (engine,) = front.has("0-1")
    front.fleet.leave(engine)
    front.fleet.leave(engine)
    front.fleet.add(request(2))
    assert front.has("0-2") == [1 - engine]
    front.fleet.abort("0-1", 0)
    assert front.engines[engine].aborted == ["0-1"]
    front.tell(engine, "0-1", token_ids=(5,), finish_reason=FinishReason.STOP)
    assert not front.failed
    assert list(front.fleet._open) == ["0-2"]


def test_one_lost_request_goes_elsewhere_and_its_engine_goes_on() -> None:
    front = Front()
    for number in (1, 2):
        front.fleet.add(request(number))
    (engine,) = front.has("0-1")
    lost = EngineDeadError("the replica died")
    front.fleet.on_lost(engine, "0-1", lost)
    assert front.has("0-1") == [0, 1]
    front.fleet.on_lost(engine, "0-1", lost)  # late: another has it
    assert not front.failed
    assert front.has("0-2") == [engine]
    front.tell(engine, "0-2", token_ids=(5,))
    front.fleet.on_lost(engine, "0-2", lost)
    assert list(front.failed) == ["0-2"]


def test_a_fleet_whose_engines_others_start_outlives_the_last() -> None:
    front = Front(1, is_lasting=True)
    front.fleet.add(request(1))
    front.kill(0)
    assert list(front.failed) == ["0-1"]
    assert front.death is None
    with pytest.raises(EngineDeadError, match="no engine"):
        front.fleet.add(request(2))
    front.engines[7] = FakeLink()
    front.fleet.join(7, cast("EngineLink", front.engines[7]), PLAN, "replica-a")
    front.fleet.add(request(3))
    assert front.has("0-3") == [7]


def test_nothing_is_kept_of_what_has_ended() -> None:
    front = Front()
    front.fleet.add(request(1, n=2))
    (engine,) = front.has("0-1")
    for index in range(2):
        delta = TokenDelta(request_id="0-1", index=index, finish_reason=FinishReason.LENGTH)
        front.owners[engine].on_deltas(Deltas([delta]))
    assert not front.fleet._open
    front.fleet.abort("0-1")
    assert front.engines[engine].aborted == []
    front.kill(engine)
    assert not front.failed


@pytest.mark.parametrize("seed", range(5))
def test_every_request_ends_once_whatever_dies(seed: int) -> None:
    rng, front = random.Random(seed), Front(3)
    ended: set[str] = set()
    for number in range(200):
        match rng.randrange(8):
            case 0 if len(front.engines) > 1:
                front.kill(rng.choice(list(front.engines)))
            case 1 if len(front.engines) < 3:
                front.start(next(one for one in range(3) if one not in front.engines))
            case 2:
                front.owners[0].on_held(Held(rng.randrange(5), is_cleared=rng.random() < 0.1))
            case _:
                front.fleet.add(request(number, rng.randrange(4)))
        for engine, link in front.engines.items():
            for request_id in list(link.sent):
                if rng.random() < 0.3:
                    is_last = rng.random() < 0.5
                    reason = FinishReason.STOP if is_last else None
                    front.tell(engine, request_id, token_ids=(1,), finish_reason=reason)
                    if is_last:
                        link.sent.remove(request_id)
                        assert request_id not in ended
                        ended.add(request_id)
    open_now = {one for link in front.engines.values() for one in link.sent}
    assert set(front.fleet._open) == open_now
    assert not open_now & (ended | set(front.failed))
    assert not ended & set(front.failed)


def test_hashes_are_those_of_the_model_the_salt_and_the_tokens(tmp_path: Path) -> None:
    def hashes(start: int, salt: str = "", identity: str = "m") -> list[int]:
        files = ModelFiles(
            name="m",
            kind="config",
            path=tmp_path,
            config={},
            generation_config={},
            identity=identity,
        )
        hasher = RequestHasher(EngineConfig(model="m"), files, PLAN)
        ids = pack_ids([start, *range(63)])
        return hasher.hashes(
            Request(request_id="1", packed_prompt=ids, params=SamplingParams(), cache_salt=salt)
        )

    assert len(hashes(1)) == 4
    assert hashes(1) == hashes(1)
    assert not set(hashes(1)) & set(hashes(2))
    assert not set(hashes(1)) & set(hashes(1, "salt"))
    assert not set(hashes(1)) & set(hashes(1, identity="another"))
