"""Octavo on a real Ray cluster: two nodes on this host, the demo model, one app that changes.

An app that scales, then one of two engines of which one dies, then an update, then one engine whose
ranks are on two nodes.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.deploy.own_python import ROOT, python_with

pytestmark = [pytest.mark.slow, pytest.mark.demo]
INSTALL_SECONDS = 300
SECONDS = 240
"""What is waited for comes in a few, but not on a machine that does much else."""
ENGINE = {
    "device": "cpu",
    "num_threads": 1,
    "max_model_len": 768,
    "max_num_batched_tokens": 128,
    "kv_cache_memory_bytes": 64 * 2**20,
}
ARGS: dict[str, Any] = {
    "model": "demo-moe",
    "engine": ENGINE,
    "server": {"max_store_bytes": 0},
    "cpus_per_ingress": 0.5,
    "upscale_delay_s": 0.0,
    "downscale_delay_s": 1.0,
}
PROMPT = "The lighthouse stood at the end of the bay and nobody had lit its lamp for years. " * 2


@pytest.fixture(scope="module")
def ray_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has Ray beside all that this one has; skipped where it cannot be had."""
    folder = tmp_path_factory.mktemp("ray") / "venv"
    return python_with("ray", "ray[serve]>=2.60", folder, INSTALL_SECONDS)


class RayCluster:
    """A process that runs `ray_cluster.py`."""

    def __init__(self, python: str, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "ray.log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # others beside this test would starve them
            "RAY_DEDUP_LOGS": "0",
            "OMP_NUM_THREADS": "1",
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(ROOT / "tests/deploy/ray_cluster.py"), "4", str(port)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                cwd=folder,
                text=True,
            )

    def ask(self, *command: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the cluster has ended: {self.log.read_text()[-3000:]}"
        return json.loads(line)

    def deploy(self, **args: Any) -> None:
        told = self.ask("deploy", {**ARGS, **args})
        assert told == "", f"{told}\n{self.log.read_text()[-3000:]}"

    def await_replicas(self, number: int, seconds: float = SECONDS) -> None:
        await_that(lambda: self.num_running() == number, seconds, self.log)

    def num_running(self) -> int:
        return self.ask("status")["engines"].get("RUNNING", 0)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def await_that(is_so: Callable[[], bool], seconds: float, log: Path) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(ray_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    found = RayCluster(ray_python, tmp_path_factory.mktemp("cluster"))
    try:
        yield found
    finally:
        found.close()


def complete(url: str, prompt: str, max_tokens: int = 8, **more: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json={**body, **more}, timeout=SECONDS)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def stream(url: str, prompt: str, max_tokens: int) -> tuple[str, str]:
    """Returns the text, and how it ended: [DONE], the code of an error event, or of a refusal."""
    body = {
        **{"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }
    text = ""
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=SECONDS) as answer:
        if answer.status_code != 200:
            return text, json.loads(answer.read())["error"]["code"]
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return text, data
            if not data:
                continue
            event = json.loads(data)
            if "error" in event:
                return text, event["error"]["code"]
            text += event["choices"][0]["text"]
    return text, "cut"


class Load:
    """Clients that ask again and again, half of them for streams, and what they were told."""

    def __init__(self, url: str, num_clients: int, max_tokens: int = 48) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._max_tokens = max_tokens
        self.ends: list[tuple[bool, str, str]] = []
        """Whether something had begun, the text, and the end, of each request."""
        self._pool = concurrent.futures.ThreadPoolExecutor(num_clients)
        self._clients = [self._pool.submit(self._ask, number) for number in range(num_clients)]

    def _ask(self, number: int) -> None:
        turn = 0
        while not self._is_over.is_set():
            turn += 1
            prompt = f"{number} {turn} {PROMPT}"
            if number % 2:
                text, end = stream(self._url, prompt, self._max_tokens)
                self.ends.append((bool(text), text, end))
                continue
            answer = complete(self._url, prompt, self._max_tokens)
            is_well = answer.status_code == 200
            end = "[DONE]" if is_well else answer.json()["error"]["code"]
            self.ends.append((not is_well, text_of(answer) if is_well else "", end))

    def end(self) -> Counter[str]:
        """Returns how many requests ended how; raises what a client met that is no answer."""
        self._is_over.set()
        for client in self._clients:
            client.result(SECONDS)
        self._pool.shutdown()
        return Counter(end for _, _, end in self.ends)


def samples(url: str, name: str) -> list[float]:
    """Returns a metric's values, one an engine."""
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{")]


def context_of(url: str) -> int:
    return httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["max_model_len"]


def num_seen(url: str) -> int:
    """Returns how many engines the ingress sends requests to."""
    return int(sum(samples(url, "octavo:engine_up")))


def a_cluster_without_the_resources_says_what_it_has(cluster: RayCluster) -> None:
    told = cluster.ask("deploy", {**ARGS, "gpus_per_rank": 1, "min_replicas": 2, "max_replicas": 2})
    assert "ConfigError: 2 replicas of 1 ranks (1 CPU, 1 GPU each)" in told
    assert "2 nodes: 4 CPU; 4 CPU" in told


def an_app_answers_streams_and_scales_with_its_load(cluster: RayCluster) -> None:
    cluster.deploy(max_replicas=2, target_requests=2)
    assert cluster.num_running() == 1
    chat = {"messages": [{"role": "user", "content": "Who lit the lamp?"}], "max_tokens": 8}
    answer = httpx.post(f"{cluster.url}/v1/chat/completions", json=chat, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] > 0
    whole = text_of(complete(cluster.url, PROMPT, 12))
    assert stream(cluster.url, PROMPT, 12) == (whole, "[DONE]")
    wrong = complete(cluster.url, PROMPT, 12, temperature="hot")
    assert wrong.status_code == 400

    load = Load(cluster.url, 6, 12)
    cluster.await_replicas(2)
    time.sleep(2)
    assert set(load.end()) == {"[DONE]"}
    cluster.await_replicas(1)
    assert text_of(complete(cluster.url, PROMPT, 12)) == whole


def a_prefix_goes_where_it_is(cluster: RayCluster) -> None:
    cluster.deploy(min_replicas=2, max_replicas=2)
    cluster.await_replicas(2)
    await_that(lambda: num_seen(cluster.url) == 2, SECONDS, cluster.log)

    def cached(prompt: str) -> int:
        answer = complete(cluster.url, prompt, 2)
        text_of(answer)
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    prompts = [f"Story {number}. {PROMPT}" for number in range(4)]
    for prompt in prompts:
        cached(prompt)
    assert all(cached(prompt) > 0 for prompt in prompts for _ in range(2))

    def hits() -> list[float]:
        return samples(cluster.url, "octavo:prefix_cache_hits_total")

    assert len(hits()) == 2
    # What engines count is heard of now and then.
    await_that(lambda: sum(hits()) > 0, SECONDS, cluster.log)


def a_replica_that_dies_harms_only_what_it_had_begun(cluster: RayCluster) -> None:
    load = Load(cluster.url, 6, 24)
    await_that(lambda: len(load.ends) >= 2, SECONDS, cluster.log)
    killed = cluster.ask("kill", cluster.ask("replicas")[0])
    time.sleep(3)
    ends = load.end()
    assert set(ends) <= {"[DONE]", "engine_dead"}
    assert ends["[DONE]"] >= 2
    assert ends["engine_dead"] <= 6
    # What had not begun was sent elsewhere: only what had is told of the death.
    assert all(has_begun for has_begun, _, end in load.ends if end == "engine_dead")
    cluster.await_replicas(2)
    assert killed not in cluster.ask("replicas")
    text_of(complete(cluster.url, PROMPT, 4))


def an_update_drains_what_it_replaces(cluster: RayCluster) -> None:
    before = set(cluster.ask("replicas"))
    load = Load(cluster.url, 2, 8)
    cluster.deploy(engine={**ENGINE, "max_model_len": 1024}, min_replicas=2, max_replicas=2)
    ends = load.end()
    assert set(ends) == {"[DONE]"}
    await_that(lambda: not before & set(cluster.ask("replicas")), SECONDS, cluster.log)
    await_that(lambda: context_of(cluster.url) == 1024, SECONDS, cluster.log)


def ranks_on_two_nodes_draw_the_tokens_of_one_process(cluster: RayCluster) -> None:
    one = [text_of(complete(cluster.url, f"{n} {PROMPT}", 16)) for n in range(3)]
    # Nine heads are shared by three, of which a node of four CPUs has room for two.
    cluster.deploy(engine={**ENGINE, "tensor_parallel_size": 3}, cpus_per_rank=1.5)
    assert len(set(cluster.ask("nodes_of_ranks"))) == 2
    assert [text_of(complete(cluster.url, f"{n} {PROMPT}", 16)) for n in range(3)] == one


@pytest.mark.timeout(900)
def test_an_app_lives_on_a_cluster(cluster: RayCluster) -> None:
    """One test, since each step goes on with what the one before has left."""
    for step in (
        a_cluster_without_the_resources_says_what_it_has,
        an_app_answers_streams_and_scales_with_its_load,
        a_prefix_goes_where_it_is,
        a_replica_that_dies_harms_only_what_it_had_begun,
        an_update_drains_what_it_replaces,
        ranks_on_two_nodes_draw_the_tokens_of_one_process,
    ):
        print(step.__name__, flush=True)
        step(cluster)
