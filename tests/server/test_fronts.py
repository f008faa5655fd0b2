"""`octavo serve --api-processes`: one port, one engine, one set of metrics; every end is clean."""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from octavo.server.fronts import LOOK_SECONDS, SKIPPED_SECONDS
from tests.server.fronts import Fronts
from tests.server.tiny_engine import write_model

NUM_FRONTS = 2


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Fronts]:
    (tmp_path / "model").mkdir()
    options = (f"--api-processes={NUM_FRONTS}", "--watchdog-timeout=12", "--shutdown-timeout=5")
    started = Fronts(write_model(tmp_path / "model"), tmp_path / "log", *options)
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture
def fronts(starting: Fronts) -> Fronts:
    assert starting.url
    return starting


def ask(url: str) -> tuple[int, str]:
    """Streams one answer over a connection of its own."""
    body = {"prompt": "Once upon", "max_tokens": 20, "ignore_eos": True, "stream": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    return answer.status_code, answer.text


def metric(url: str, name: str) -> float:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_work_is_dealt_out_a_moment_is_forgiven_and_a_drain_lets_streams_end(fronts: Fronts):
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, [fronts.url] * 12))
    assert all(status == 200 and text.endswith("[DONE]\n\n") for status, text in answers)
    # Whichever process is asked, it tells of all.
    for _ in range(NUM_FRONTS):
        assert metric(fronts.url, "vllm:request_success_total{") == 12
        assert metric(fronts.url, "vllm:inter_token_latency_seconds_count") > 12
    assert metric(fronts.url, "vllm:generation_tokens_total") == 12 * 20
    processes = fronts.children("octavo.server.front_process")
    assert len(processes) == NUM_FRONTS

    os.kill(processes[0], signal.SIGSTOP)
    time.sleep(SKIPPED_SECONDS + 2 * LOOK_SECONDS)
    os.kill(processes[0], signal.SIGCONT)
    time.sleep(3 * LOOK_SECONDS)
    assert all(ask(fronts.url)[0] == 200 for _ in range(2 * NUM_FRONTS))

    body = {"prompt": "Once upon", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{fronts.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        fronts.process.send_signal(signal.SIGTERM)
        # Probes are answered until the end, whichever process they meet.
        assert httpx.get(f"{fronts.url}/health", timeout=10).status_code == 200
        assert list(lines)[-2:] == ["data: [DONE]", ""]
    assert fronts.end() == 0


@pytest.mark.parametrize("module", ["octavo.server.front_process", "octavo.engine.process"])
def test_the_death_of_a_part_is_the_end_of_the_whole(fronts: Fronts, module: str):
    os.kill(fronts.children(module)[0], signal.SIGKILL)
    assert fronts.end() == 1
    assert "SIGKILL" in fronts.log.read_text()


def test_a_front_that_hangs_gets_no_connections_and_then_ends_the_server(fronts: Fronts):
    stopped = fronts.children("octavo.server.front_process")[0]
    assert ask(fronts.url)[0] == 200
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(SKIPPED_SECONDS + 3 * LOOK_SECONDS)
    for _ in range(2 * NUM_FRONTS):
        assert httpx.get(f"{fronts.url}/health", timeout=10).status_code == 200, (
            fronts.log.read_text()
        )
    assert fronts.end() == 1
    assert re.search(r"front process \d made no progress for 12 s", fronts.log.read_text())


def test_a_front_that_hangs_before_it_serves_keeps_nobody_from_ending(starting: Fronts):
    deadline = time.monotonic() + 60
    while not (found := starting.children("octavo.server.front_process")):
        assert time.monotonic() < deadline, starting.log.read_text()
        time.sleep(0.01)
    os.kill(found[0], signal.SIGSTOP)
    starting.process.send_signal(signal.SIGTERM)
    assert starting.end() in (0, 1)
    assert "is served on" not in starting.log.read_text()


def test_the_death_of_the_parent_leaves_nobody(fronts: Fronts):
    pids = [
        *fronts.children("octavo.server.front_process"),
        *fronts.children("octavo.engine.process"),
    ]
    assert len(pids) == NUM_FRONTS + 1
    fronts.process.kill()
    fronts.process.wait()
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_fronts_over_a_fleet_go_on_when_an_engine_dies(tmp_path: Path):
    (tmp_path / "model").mkdir()
    options = ("--api-processes=2", "--data-parallel-size=2", "--shutdown-timeout=5")
    server = Fronts(write_model(tmp_path / "model"), tmp_path / "log", *options)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, [server.url] * 8))
            assert all(status == 200 and text.endswith("[DONE]\n\n") for status, text in answers)
            assert metric(server.url, "octavo:engine_up{") == 2
            # Wherever a request comes in, its prefix is found where it is.
            assert metric(server.url, "vllm:prefix_cache_hits_total{") == 0  # too short for a block
            os.kill(server.children("octavo.engine.process")[0], signal.SIGKILL)
            again = list(pool.map(ask, [server.url] * 8))
        statuses = [status for status, _ in again]
        assert set(statuses) <= {200, 503}, again
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
        deadline = time.monotonic() + 90
        while metric(server.url, "octavo:engine_up{") < 2:
            assert time.monotonic() < deadline, server.log.read_text()
            time.sleep(0.3)
        assert all(ask(server.url)[0] == 200 for _ in range(8))
        assert "engine 0" in server.log.read_text() or "engine 1" in server.log.read_text()
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    finally:
        server.process.kill()
        server.process.wait()
