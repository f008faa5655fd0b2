"""Engines that hang, stop, crash and are slow; and the looks that tell these apart."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from octavo import AsyncLLM, SamplingParams
from octavo.engine.vitals import Reading
from octavo.engine.watchdog import BUILD_FACTOR, DRAIN_SECONDS, LOOK_SECONDS, Watchdog
from octavo.errors import EngineDeadError
from tests.engine.configs import PROMPT, config
from tests.engine.hung_engine import CRASH, HOLD, LEAVE, SLOW, SPIN
from tests.models.tiny import save_tiny


def seconds_until_hung(
    watchdog: Watchdog,
    reading: Callable[[float], Reading],
    *,
    for_seconds: float = 2000.0,
    look_seconds: float = LOOK_SECONDS,
) -> float | None:
    """When a watchdog that looks so often at what is read gives up; None if it does not."""
    now = 1e6
    while now < 1e6 + for_seconds:
        if watchdog.look(reading(now - 1e6), now) is not None:
            return now - 1e6
        now += look_seconds
    return None


def silent(now: float) -> Reading:
    return Reading(5, False)


def test_silence_for_the_limit_is_a_hang() -> None:
    found = seconds_until_hung(Watchdog(60.0), silent)
    assert found == pytest.approx(60.0, abs=1.0)


def test_an_engine_that_is_slow_but_moves_does_not_hang() -> None:
    assert seconds_until_hung(Watchdog(60.0), lambda now: Reading(int(now / 50), False)) is None


def test_building_a_kernel_may_take_longer() -> None:
    found = seconds_until_hung(Watchdog(60.0), lambda now: Reading(5, True))
    assert found == pytest.approx(60.0 * BUILD_FACTOR, abs=1.0)


def test_during_a_drain_silence_is_borne_less_long() -> None:
    for limit in (0.0, 60.0):
        watchdog = Watchdog(limit)
        watchdog.is_draining = True
        found = seconds_until_hung(watchdog, lambda now: Reading(5, True))
        assert found == pytest.approx(DRAIN_SECONDS, abs=1.0)


def test_without_a_limit_nothing_is_a_hang() -> None:
    assert seconds_until_hung(Watchdog(0.0), silent) is None


def test_a_front_that_was_suspended_does_not_blame_the_engine() -> None:
    # Looks an hour apart are few looks, however long the engine was silent between them.
    looks = Watchdog(60.0)
    assert seconds_until_hung(looks, silent, for_seconds=50 * 3600, look_seconds=3600) is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("mixtral", tmp_path_factory.mktemp("mixtral")).folder)


@asynccontextmanager
async def engine(model: str, **more: Any) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(config(model, **more))
    await llm.start()
    try:
        yield llm
    finally:
        llm.kill()
        await llm.close()


async def end_of(llm: AsyncLLM, seed: int) -> EngineDeadError:
    """The error that a request of this seed gets."""
    params = SamplingParams(max_tokens=50, ignore_eos=True, seed=seed)
    with pytest.raises(EngineDeadError) as caught:
        async for _ in llm.generate(PROMPT, params, request_id=str(seed)):
            pass
    return caught.value


@pytest.fixture
def listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.engine.spawn.ENGINE_MODULE", "tests.engine.hung_engine")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.usefixtures("listens")
@pytest.mark.parametrize("seed", [SPIN, HOLD])
async def test_an_engine_that_hangs_is_ended_and_says_where(
    model: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(model, watchdog_timeout=2.0) as llm:
        error = await end_of(llm, seed)
        assert "made no progress for 2 s" in str(error)
        with pytest.raises(EngineDeadError, match="no progress"):
            await llm.check_health()
        assert llm._client._process is not None
        assert await llm._client._process.wait() == -signal.SIGKILL
    assert "add_listening" in caplog.text
    assert all(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("is_busy", [False, True])
async def test_an_engine_that_is_stopped_is_ended(
    model: str, is_busy: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(model, watchdog_timeout=2.0) as llm:
        process = llm._client._process
        assert process is not None
        task = asyncio.create_task(end_of(llm, 1)) if is_busy else None
        await asyncio.sleep(0.02)
        os.kill(process.pid, signal.SIGSTOP)
        if task is not None:
            assert "made no progress" in str(await task)
        assert await asyncio.wait_for(process.wait(), 20) == -signal.SIGKILL
    assert "is stopped by a signal" in caplog.text


@pytest.mark.usefixtures("listens")
async def test_a_slow_engine_is_left_alone(model: str) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True, seed=SLOW)
    async with engine(model, watchdog_timeout=2.0) as llm:
        began = time.monotonic()
        outputs = [one async for one in llm.generate(PROMPT, params, request_id="slow")]
        assert outputs[-1].finished
        assert time.monotonic() - began > 2.0
        await asyncio.sleep(3.0)  # and idle
        await llm.check_health()


@pytest.mark.usefixtures("listens")
async def test_a_crash_leaves_its_stack_in_the_log(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(model) as llm:
        assert "SIGSEGV" in str(await end_of(llm, CRASH))
    assert "add_listening" in caplog.text
    assert "Segmentation fault" in caplog.text


@pytest.mark.usefixtures("listens")
async def test_an_engine_that_leaves_is_told_with_its_code(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(model) as llm:
        assert "ended with code 7" in str(await end_of(llm, LEAVE))
    assert "ended with code 7" in caplog.text
