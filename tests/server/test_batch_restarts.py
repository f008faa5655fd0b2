"""Batches over the ends of servers, clean or by kill -9: no line is lost, none is there twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.batch_jobs import begin, ended, line, prompts, results, wait_for
from tests.server.fronts import ROOT, Fronts
from tests.server.strict_client import client_of
from tests.server.tiny_engine import write_model

SLOW_SERVER = """
    import asyncio, sys
    from octavo.config import ServerConfig
    from octavo.server.serve import bind, serve, url_of
    from tests.server.fake_engine import FakeEngine

    class SlowEngine(FakeEngine):
        max_num_seqs = 8

        async def _generate(self, request, receiver):
            await asyncio.sleep(0.02)
            await super()._generate(request, receiver)

    async def main():
        config = ServerConfig(port=0, store_dir=sys.argv[1], shutdown_timeout=5.0)
        bound = bind(config)
        tell = lambda: print(url_of(bound), flush=True)
        await serve(SlowEngine(), config, bound, on_serving=tell)

    asyncio.run(main())
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def start(
    folder: Path, processes: list[subprocess.Popen[str]]
) -> tuple[subprocess.Popen[str], openai.OpenAI]:
    command = [sys.executable, "-c", textwrap.dedent(SLOW_SERVER), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    processes.append(process)
    assert process.stdout is not None
    return process, client_of(process.stdout.readline().strip(), "none")


def num_done(client: openai.OpenAI, id: str) -> int:
    return client.batches.retrieve(id).request_counts.completed  # type: ignore[union-attr]


def check(client: openai.OpenAI, id: str, count: int) -> list[dict[str, Any]]:
    """Waits for the end; asserts that each line has its one result, in order."""
    over = ended(client, id, seconds=120)
    assert (over.status, over.error_file_id) == ("completed", None)
    assert over.request_counts.to_dict() == {"total": count, "completed": count, "failed": 0}
    found = results(client, over.output_file_id)
    assert [one["custom_id"] for one in found] == [f"id-{i}" for i in range(count)]
    assert all(one["response"]["status_code"] == 200 for one in found)
    return found


def test_a_batch_goes_on_after_kill_9_and_after_sigterm(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
):
    count = 300
    process, client = start(tmp_path, processes)
    id = begin(client, prompts(count)).id
    wait_for(lambda: num_done(client, id) > 10)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process, client = start(tmp_path, processes)
    killed_at = num_done(client, id)
    assert 10 < killed_at < count
    wait_for(lambda: num_done(client, id) > killed_at + 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0
    _, client = start(tmp_path, processes)
    assert killed_at + 10 < num_done(client, id) < count
    found = check(client, id, count)
    last = client.completions.create(model="fake", prompt=f"Line {count - 1}", max_tokens=5)
    assert found[-1]["response"]["body"]["choices"][0]["text"] == last.choices[0].text
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == sorted(
        file.id for file in client.files.list()
    )


def test_front_processes_share_the_batches_of_their_tenants(tmp_path: Path):
    (tmp_path / "model").mkdir()
    model, store = write_model(tmp_path / "model"), tmp_path / "store"
    options = (
        "--api-processes=2 --api-key=key-a --api-key=key-b --shutdown-timeout=5 --max-num-seqs=4"
        f" --served-model-name=tiny --store-dir={store}"
    ).split()
    count = 14
    content = b"\n".join(
        line(f"id-{i}", {"prompt": f"Line {i}", "max_tokens": 40, "ignore_eos": True, "seed": i})
        for i in range(count)
    )
    server = Fronts(model, tmp_path / "log", *options)
    try:
        clients = [client_of(server.url, key) for key in ("key-a", "key-b")]
        ids = [begin(client, content).id for client in clients]
        for client, id in zip(clients, ids, strict=True):
            wait_for(lambda client=client, id=id: num_done(client, id) > 1, seconds=60)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        server = Fronts(model, tmp_path / "log", *options)
        clients = [client_of(server.url, key) for key in ("key-a", "key-b")]
        for client, other, id in zip(clients, clients[::-1], ids, strict=True):
            found = check(client, id, count)
            for _ in range(4):  # from whichever front process
                with pytest.raises(openai.NotFoundError):
                    other.batches.retrieve(id)
            answer = found[7]["response"]["body"]["choices"][0]["text"]
            body = json.loads(content.splitlines()[7])["body"]
            assert client.completions.create(model="tiny", **_of(body)).choices[0].text == answer
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert re.search(r"batch_\w+ completed after \d+ s: 14 of 14", server.log.read_text())
    finally:
        server.process.kill()
        server.process.wait()


def _of(body: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of OpenAI's client for a body."""
    known = {name: value for name, value in body.items() if name != "ignore_eos"}
    return {**known, "extra_body": {"ignore_eos": True}}
