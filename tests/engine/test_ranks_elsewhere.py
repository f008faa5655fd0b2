"""Ranks that others start: what brings them together, and who is told that they cannot be."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from octavo import LLM, ConfigError, EngineConfig
from octavo.config.environment import rank_key
from octavo.config.fields import read_address
from octavo.engine import rank_transport
from octavo.engine.rank_transport import RemoteRanks, join
from octavo.errors import EngineDeadError
from octavo.weights.fingerprint import with_fingerprint
from octavo.weights.hub import resolve_model
from tests.engine.configs import OPTIONS
from tests.engine.prompts import greedy, prompts_of, tokens
from tests.models import tiny

KEY = "a key of ranks, for tests"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny("qwen3-moe", tmp_path_factory.mktemp("qwen3-moe")).folder


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def rank(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from octavo.cli import main; raise SystemExit(main())"]
    return subprocess.Popen(
        [*command, "rank", *arguments],
        env={**os.environ, "OCTAVO_RANK_KEY": KEY, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ranks_of_the_command_draw_the_tokens_of_one_process(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_RANK_KEY", KEY)
    prompts = prompts_of((20, 33), seed=3)
    llm = LLM(str(model), **OPTIONS)
    expected = tokens(llm.generate(prompts, greedy(6), use_tqdm=False))
    llm.close()
    address = f"127.0.0.1:{free_port()}"
    with rank("--address", address, "--rank", "1") as other:  # before rank 0 is there
        llm = LLM(str(model), tensor_parallel_size=2, rank_address=address, **OPTIONS)
        try:
            assert tokens(llm.generate(prompts, greedy(6), use_tqdm=False)) == expected
        finally:
            llm.close()
        _, told = other.communicate(timeout=30)
    assert other.returncode == 0, told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--address", "10.0.0.1", "--rank", "1"], "address must be HOST:PORT"),
        (["--address", "0.0.0.0:7100", "--rank", "1"], "that other hosts can reach"),
        (["--address", "127.0.0.1:7100", "--rank", "0"], "rank 0 is in octavo serve"),
        (["--address", "127.0.0.1:{port}", "--rank", "1", "--wait", "0.1"],
         r"rank 1 does not reach rank 0 at 127\.0\.0\.1:\d+ within 0\.1 s: .*refused"),
    ],
)  # fmt: skip
def test_a_command_that_cannot_be_a_rank_says_why(arguments: list[str], said: str) -> None:
    port = free_port()
    with rank(*(one.format(port=port) for one in arguments)) as ended:
        _, told = ended.communicate(timeout=60)
    assert ended.returncode == 2
    assert re.search(said, told), told


def test_a_key_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_RANK_KEY", "short")
    with pytest.raises(ConfigError, match="16 characters or more"):
        rank_key()


@pytest.mark.parametrize("options", [{}, {"tensor_parallel_size": 2, "data_parallel_size": 2}])
def test_an_address_for_ranks_that_there_are_not_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size must be above 1") as caught:
        EngineConfig(model="demo", rank_address="127.0.0.1:7100", **options).resolve()
    assert caught.value.field == "rank_address"


@pytest.mark.parametrize("given", ["", "host", "host:", ":7100", "host:0", "host:70000", "h:x"])
def test_an_address_is_a_host_and_a_port(given: str) -> None:
    with pytest.raises(ConfigError, match=r"HOST:PORT with a port in 1\.\.65535"):
        read_address("rank_address", given)


def meet(*comers: Any, size: int = 2) -> Exception:
    """Returns what rank 0 raises when these functions, told its address and key, are done."""

    def announce(address: str, key: bytes) -> None:
        for comer in comers:
            Thread(target=comer, args=(address, key), daemon=True).start()

    with pytest.raises((EngineDeadError, ConfigError)) as caught:
        RemoteRanks("127.0.0.1", announce, arrival_seconds=1).start(size, 0)
    return caught.value


def test_whoever_may_not_come_is_told_why(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    def come(number: int) -> Any:
        def run(address: str, key: bytes) -> None:
            try:
                join(address, key, number, 1)
            except ConfigError as error:
                told.append(str(error))

        return run

    def stranger(address: str, key: bytes) -> None:
        try:
            join(address, b"another key", 1, 1)
        except EngineDeadError as error:
            told.append(str(error))

    error = meet(come(5), stranger)
    assert re.match(r"rank 1 of 2 did not come to 127\.0\.0\.1:\d+ within 1 s", str(error))
    assert len(told) == 2
    assert any("rank 5 is not one of 1 to 1 (tensor_parallel_size 2)" in one for one in told)
    assert any("its key is another" in one for one in told)
    assert caplog.text.count("127.0.0.1 is not let in: it does not know the key") == 1
    told.clear()
    assert "rank 2 of 3" in str(meet(come(1), come(1), size=3))
    (twice,) = told
    assert "rank 1 is there already" in twice


@pytest.mark.parametrize("said", [b"", b"\0\0\0\5hello", b"SSH-2.0-OpenSSH", b"\0\0\0\0"])
def test_a_rank_is_told_that_who_is_there_is_not_rank_0(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_transport, "GREETING_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            end, _ = server.accept()
            with end, suppress(ConnectionResetError):  # it has left words unread
                end.sendall(said)
                while end.recv(100):
                    pass

        other = Thread(target=answer)
        other.start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EngineDeadError, match=f"reaches {address}, but who is there does not"):
            join(address, KEY.encode(), 1, 0.1)
        other.join(10)
        assert not other.is_alive(), "the connection is left open"


def test_a_rank_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = rank_transport._refusal(rank_transport._Greeting(1, "0.0.1"), 2, ())
    assert "it runs Octavo 0.0.1, rank 0 " in refusal


def test_a_port_that_is_taken_is_told_of() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ranks = RemoteRanks("127.0.0.1", lambda *_: None, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"ranks cannot come to 127\.0\.0\.1:\d+: .*in use"):
            ranks.start(2, 0)


def test_weights_have_the_same_name_on_all_hosts_and_others_another(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    for file in model.iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    here, there = (resolve_model(str(one)) for one in (model, tmp_path / "copy"))
    assert here.identity != there.identity  # files of another time
    assert with_fingerprint(here).identity == with_fingerprint(there).identity
    (weights,) = (tmp_path / "copy").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    there = resolve_model(str(tmp_path / "copy"))
    assert with_fingerprint(here).identity != with_fingerprint(there).identity
