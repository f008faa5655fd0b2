"""The way to a guard, by itself: what the log has of checks that failed."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest

from octavo.guard import Guard, GuardCheck, GuardText
from octavo.server.errors import ApiError
from octavo.server.guards import gate as gate_module
from octavo.server.guards.gate import Gate, GateLimits
from tests.server.guards import judges

LIMITS = GateLimits(seconds=5.0, max_concurrent=4, max_waiting=4, fails_open=False)
CHECK = GuardCheck(
    stage="input",
    texts=(GuardText(role="user", place="prompt", text="my own words"),),
    request_id="1",
    route="/v1/completions",
    model="m",
    tenant="",
    key="",
)


def gate_of(guard: Guard) -> Gate:
    return Gate(guard, LIMITS, frozenset({"input"}), 0)


async def fail(gate: Gate, times: int) -> None:
    for _ in range(times):
        with pytest.raises(ApiError):
            await gate.decide(CHECK)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.name == gate_module.__name__]


@pytest.mark.parametrize("guard", [judges.quoting, judges.quoting_async])
def test_the_text_of_a_guards_exception_is_not_logged(
    guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    asyncio.run(fail(gate_of(guard), 1))
    [line] = lines(caplog)
    assert "my own words" not in line
    assert "ValueError at " in line
    assert "judges.py:" in line


def test_failures_after_a_line_have_one_too_though_none_follows(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "LOG_SECONDS", 0.05)

    async def run() -> None:
        told = asyncio.Event()

        class Told(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if record.getMessage().startswith("2 checks"):
                    told.set()

        handler = Told()
        gate_module.logger.addHandler(handler)
        gate = gate_of(judges.quoting_async)
        await fail(gate, 3)
        async with asyncio.timeout(10):
            await told.wait()
        gate_module.logger.removeHandler(handler)

    asyncio.run(run())
    assert [line.split()[0] for line in lines(caplog)] == ["1", "2"]


def test_failures_that_were_not_told_of_are_told_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        gate = gate_of(judges.quoting_async)
        await fail(gate, 3)
        await gate.close()

    asyncio.run(run())
    assert [line.split()[0] for line in lines(caplog)] == ["1", "2"]


def test_a_refusal_without_a_reason_has_no_colon_without_an_end(start_server: Any) -> None:
    url = start_server(guard="tests.server.guards.judges:silent").url
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "hi", "max_tokens": 5})
    assert answer.json()["error"]["message"] == "this server's guard refused the request"
