"""Octavo under the real `bentoml serve`, asked by OpenAI's client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import BadRequestError, NotFoundError, OpenAI

from benchmarks.process_figures import children_of
from octavo.server.tenants.route_scopes import ROUTE_SCOPES
from tests.deploy.own_python import ROOT, python_with
from tests.deploy.process_tree import end_tree, end_with_parent

pytestmark = [pytest.mark.slow, pytest.mark.demo]
INSTALL_SECONDS = 240
START_SECONDS = 240
"""It comes in ten, but not on a machine that does much else."""
ENGINE = {
    "device": "cpu",
    "num_threads": 1,
    "max_model_len": 512,
    "kv_cache_memory_bytes": 64 * 2**20,
}
KEY = "only for this test"
TALE = "The lighthouse stood at the end of the bay, and nobody had lit its lamp for years."


class Service:
    """A `bentoml serve` of deploy/bentoml, and how its `/readyz` answered until it was 200."""

    def __init__(self, python: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "bentoml.log"
        environment = {
            **os.environ,
            "BENTOML_DO_NOT_TRACK": "true",
            "BENTOML_HOME": str(folder / "home"),
            "MODEL": "demo",
            "ENGINE_OPTIONS": json.dumps(ENGINE),
            "SERVER_OPTIONS": json.dumps({"served_model_name": ["tales"], "max_store_bytes": 0}),
            "OCTAVO_API_KEY": KEY,
            "OMP_NUM_THREADS": "1",
        }
        command = [python, "-m", "bentoml", "serve", "service:Octavo"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=ROOT / "deploy" / "bentoml",
                preexec_fn=end_with_parent,
            )
        self.told = set[int]()
        self.started: list[int] = []

    def await_ready(self) -> None:
        end = time.monotonic() + START_SECONDS
        while 200 not in self.told:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            try:
                self.told.add(httpx.get(f"{self.url}/readyz", timeout=10).status_code)
            except httpx.TransportError:
                time.sleep(0.1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("bentoml")
    python = python_with("bentoml", "bentoml>=1.4.40", folder / "venv", INSTALL_SECONDS)
    found = Service(python, folder)
    try:
        found.await_ready()
        yield found
    finally:
        end_tree(found.process, found.started)  # has ended, if all is well


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as found:
        yield found


@pytest.mark.timeout(INSTALL_SECONDS + START_SECONDS + 60)
def test_the_routes_are_those_of_a_server(service: Service, client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by) == ("tales", "octavo")
    assert service.told <= {200, 503}
    assert httpx.get(f"{service.url}/health", timeout=30).status_code == 200


def test_nobody_asks_without_a_key(service: Service) -> None:
    for path, scopes in ROUTE_SCOPES.items():
        if scopes and "{" not in path:
            for method in ("GET", "POST"):
                told = httpx.request(method, f"{service.url}{path}", timeout=30)
                assert told.status_code == 401, (method, path)


def test_a_stream_says_what_the_whole_answer_says(client: OpenAI) -> None:
    asked = [{"role": "user", "content": TALE}]
    options = {"model": "tales", "messages": asked, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert text == whole.choices[0].message.content
    assert text
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 16
    details = chunks[-1].usage.prompt_tokens_details
    assert details is not None
    assert details.cached_tokens


def test_mistakes_are_the_clients(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="max_tokens"):
        client.completions.create(model="tales", prompt=TALE, max_tokens=-1)
    with pytest.raises(NotFoundError):
        client.completions.create(model="another", prompt=TALE)


def test_its_end_leaves_no_process(service: Service) -> None:
    """The last one: nothing is answered afterwards."""
    started = service.started = children_of(service.process.pid)
    assert started
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(90)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{one}").exists() for one in started):
        assert time.monotonic() < end, service.log.read_text()[-3000:]
        time.sleep(0.1)
