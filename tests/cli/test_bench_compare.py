"""`octavo bench compare`: the same requests to two servers in turn."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.cli import main
from octavo.cli.bench.compare import Round, compared
from tests.cli.conftest import FakeServer, served_fake
from tests.conftest import save_tiny_chat_model

SHORT = ["--rounds", "3", "--num-prompts", "4", "--concurrency", "2"]
LENGTHS = ["--input-len", "12:20", "--output-len", "3"]


@pytest.fixture
def other_server() -> Iterator[FakeServer]:
    with served_fake() as fake:
        yield fake


def compare(first: str, second: str, output: Path, *more: str) -> dict[str, Any]:
    argv = ["bench", "compare", "--url", first, "--url", second, "--output", str(output)]
    assert main([*argv, *SHORT, *LENGTHS, *more]) == 0
    (line,) = output.read_text().splitlines()
    return json.loads(line)["figures"]


def test_both_get_the_same_requests_in_turn_and_a_warm_up_that_does_not_count(
    fake_server: FakeServer, other_server: FakeServer, tmp_path: Path, monkeypatch: Any
):
    order: list[str] = []
    for name, fake in (("a", fake_server), ("b", other_server)):

        class Noted(list[Any]):
            def append(self, body: Any, name: str = name) -> None:
                order.append(name)
                super().append(body)

        monkeypatch.setattr(fake, "bodies", Noted())
    figures = compare(fake_server.url, other_server.url, tmp_path / "out")

    def sent(fake: FakeServer, index: int) -> list[str]:
        return sorted(body["prompt"] for body in fake.bodies[4 * index :][:4])

    assert len(fake_server.bodies) == len(other_server.bodies) == 4 * 4
    for index in range(4):
        assert sent(fake_server, index) == sent(other_server, index)
    # Who is first changes from round to round.
    sets = ["".join(order[at : at + 4]) for at in range(0, len(order), 4)]
    assert [one[0] for one in sets] == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert all(len(set(one)) == 1 for one in sets)
    # A word is some tokens, and no round repeats another's.
    prompts = {body["prompt"] for body in fake_server.bodies}
    assert len(prompts) == 16
    assert {len(prompt.split()) for prompt in prompts} <= set(range(5, 9))
    assert fake_server.most_open == other_server.most_open == 2
    assert figures["rounds"] == 3
    assert figures["output_tokens_a"] == figures["output_tokens_b"] == 3 * 4 * 3
    assert len(figures["e2e_p50_ms_ratios"]) == 3


def test_times_are_those_of_the_server(
    fake_server: FakeServer, other_server: FakeServer, tmp_path: Path, capfd: Any
):
    other_server.delay = 0.05
    other_server.tells_usage = False  # its events are its tokens then
    figures = compare(fake_server.url, other_server.url, tmp_path / "out")
    assert figures["output_tokens_b"] == figures["output_tokens_a"]
    # Three pieces, each after 50 ms; the first server's times depend on what else runs here.
    for name, least in (("ttft_p50_ms", 50), ("tpot_p50_ms", 50), ("e2e_p50_ms", 150)):
        low, high = (figures[f"{name}_ratio_{end}"] for end in ("low", "high"))
        assert 0 < low <= figures[f"{name}_ratio"] <= high
        assert figures[f"{name}_b"] >= 0.98 * least
    table = capfd.readouterr().err
    assert "A / B" in table
    assert "higher is better" in table


def test_a_ratio_is_of_one_round_and_its_spread_that_of_the_rounds():
    def rounds(*rates: float) -> list[Round]:
        figures = [{"requests_per_second": rate} for rate in rates]
        return [Round(figures=one, output_tokens=1, prompt_tokens=1) for one in figures]

    told = compared({"a": rounds(1, 2, 9), "b": rounds(2, 2, 3)})
    assert told["requests_per_second_ratio"] == 1
    assert told["requests_per_second_ratio_low"] == 0.5
    assert told["requests_per_second_ratio_high"] == 3
    assert (told["requests_per_second_a"], told["requests_per_second_b"]) == (2, 2)
    assert "ttft_p50_ms_ratio" not in told


def test_each_server_has_its_key_and_its_model(
    fake_server: FakeServer, other_server: FakeServer, tmp_path: Path
):
    fake_server.key, other_server.key = "first", "second"
    keys = ["--api-key", "first", "--api-key", "second", "--served-model", "m", "--ignore-eos"]
    compare(fake_server.url, other_server.url, tmp_path / "out", *keys)
    for fake in (fake_server, other_server):
        assert {body["model"] for body in fake.bodies} == {"m"}
        assert all(body["ignore_eos"] for body in fake.bodies)
    assert "first" not in (tmp_path / "out").read_text()


def test_what_cannot_be_compared_is_refused(
    fake_server: FakeServer, other_server: FakeServer, capsys: pytest.CaptureFixture[str]
):
    urls = ["--url", fake_server.url, "--url", other_server.url]
    for argv, words in (
        (["--url", fake_server.url], "two --url are compared, not 1"),
        ([*urls, "--api-key=1", "--api-key=2", "--api-key=3"], "--api-key is given 3 times"),
    ):
        assert main(["bench", "compare", *argv, *SHORT, *LENGTHS]) == 2
        assert words in capsys.readouterr().err
    other_server.refuse = "out of paper"
    assert main(["bench", "compare", *urls, *SHORT, *LENGTHS]) == 2
    assert f"{other_server.url}: 4 requests failed" in capsys.readouterr().err


# -- real servers ----------------------------------------------------------------------------------


@contextlib.contextmanager
def running(argv: list[str], url: str) -> Iterator[None]:
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 180
        while True:
            assert process.poll() is None, argv
            assert time.monotonic() < deadline, f"{argv} is not ready"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            time.sleep(0.3)
        yield
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def octavo_on(model: str, port: int) -> list[str]:
    """Its command."""
    code = "import sys; from octavo.cli import main; sys.exit(main())"
    options = ["--device=cpu", "--num-threads=1", "--kv-cache-memory=8MiB", "--dtype=float32"]
    return [sys.executable, "-c", code, "serve", model, f"--port={port}", *options]


@pytest.mark.slow
def test_transformers_and_two_octavos_are_compared(tmp_path: Path):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = save_tiny_chat_model(tmp_path / "tiny")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.save_pretrained(folder)
    ports = [free_port() for _ in range(3)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    transformers = [str(Path(sys.executable).parent / "transformers"), "serve", folder]
    transformers += ["--host=127.0.0.1", f"--port={ports[0]}", "--device=cpu"]
    with (
        running(transformers, urls[0]),
        running(octavo_on(folder, ports[1]), urls[1]),
        running(octavo_on(folder, ports[2]), urls[2]),
    ):
        for index, pair in enumerate(((urls[1], urls[0]), (urls[1], urls[2]))):
            figures = compare(*pair, tmp_path / f"{index}.jsonl")
            assert figures["output_tokens_a"] == figures["output_tokens_b"] > 0
            assert figures["prompt_tokens_a"] == figures["prompt_tokens_b"] > 0
            assert figures["output_tokens_per_second_ratio"] > 0
            low, high = (figures[f"ttft_p50_ms_ratio_{end}"] for end in ("low", "high"))
            assert 0 < low <= figures["ttft_p50_ms_ratio"] <= high
