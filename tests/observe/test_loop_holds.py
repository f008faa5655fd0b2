"""The monitor of the event loop sees whatever holds it, on asyncio's loop and on uvloop's."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable

import pytest
import uvloop

from octavo.observe.loop_holds import LoopHoldMonitor

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
HOLD = 0.05


def spin(seconds: float = HOLD) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


def monitored(
    new_loop: Callable[[], asyncio.AbstractEventLoop], work: Callable[[], Awaitable[None]]
) -> LoopHoldMonitor:
    """Runs `work` on a loop that a monitor watches and returns the monitor."""
    monitor = LoopHoldMonitor()

    async def main() -> None:
        monitor.install(asyncio.get_running_loop())
        await work()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())
    return monitor


async def in_a_task() -> None:
    async def step() -> None:
        await asyncio.sleep(0)
        spin()

    await asyncio.create_task(step())


async def in_a_callback() -> None:
    asyncio.get_running_loop().call_soon(spin)
    await asyncio.sleep(0.01)


async def in_a_timer() -> None:
    asyncio.get_running_loop().call_later(0.001, spin, HOLD)
    await asyncio.sleep(0.05)


async def in_a_callback_from_a_thread() -> None:
    loop = asyncio.get_running_loop()
    await asyncio.to_thread(loop.call_soon_threadsafe, spin)
    await asyncio.sleep(0.01)


async def in_a_reader() -> None:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        read = asyncio.Event()

        def on_readable() -> None:
            spin()
            loop.remove_reader(ours)
            read.set()

        loop.add_reader(ours, on_readable)
        theirs.send(b"x")
        await read.wait()


@pytest.mark.parametrize("new_loop", LOOPS)
@pytest.mark.parametrize(
    "work", [in_a_task, in_a_callback, in_a_timer, in_a_callback_from_a_thread, in_a_reader]
)
def test_whatever_holds_the_loop_is_seen_and_named(new_loop, work, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        monitor = monitored(new_loop, work)
    assert monitor.longest_seconds >= HOLD
    assert monitor.longest_callback
    assert any("held the event loop" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("new_loop", LOOPS)
def test_waiting_and_work_in_threads_hold_nothing(new_loop) -> None:
    async def work() -> None:
        await asyncio.sleep(0.06)
        await asyncio.to_thread(spin)

    assert monitored(new_loop, work).longest_seconds < HOLD
