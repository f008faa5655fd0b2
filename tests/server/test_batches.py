"""/v1/batches over a real socket: every line has one result, whatever happens meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.errors import OverloadedError
from octavo.request_limits import MAX_INT
from octavo.server.batches import worker
from tests.no_folder import NOWHERE
from tests.server.batch_jobs import CHAT, ENDS, TEXT, begin, ended, line, prompts, results, wait_for
from tests.server.conftest import ServerThread, StartServer
from tests.server.fake_engine import FakeEngine
from tests.server.strict_client import client_of, error_of


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[FakeEngine]]:
    folder = tmp_path_factory.mktemp("store")
    config = ServerConfig(
        port=0, store_dir=str(folder), shutdown_timeout=1.0, api_key=("key-a", "key-b")
    )
    started = ServerThread(FakeEngine(), config)
    yield started
    started.end()


@pytest.fixture(scope="module")
def client(server: ServerThread[FakeEngine]) -> Iterator[openai.OpenAI]:
    with client_of(server.url, "key-a") as strict:
        yield strict


# -- what comes of lines -------------------------------------------------------------------------


def test_each_line_gets_the_answer_that_its_route_gives(
    client: openai.OpenAI, server: ServerThread[FakeEngine]
):
    bodies = [
        {"messages": [{"role": "user", "content": "Hello"}], "n": 2, "max_tokens": 3},
        {"messages": [{"role": "user", "content": "World"}], "logprobs": True, "top_logprobs": 2},
    ]
    batch = begin(
        client,
        b"\n".join(line(f"{i}", body, CHAT) for i, body in enumerate(bodies)) + b"\n\n",
        CHAT,
        metadata={"for": "a test"},
    )
    assert batch.status == "validating"
    over = ended(client, batch.id)
    assert over.status == "completed"
    assert over.metadata == {"for": "a test"}
    assert over.error_file_id is None
    assert over.request_counts.to_dict() == {"total": 2, "completed": 2, "failed": 0}
    assert over.created_at <= over.in_progress_at <= over.finalizing_at <= over.completed_at
    assert over.expires_at == over.created_at + 86400
    found = results(client, over.output_file_id)
    assert [one["custom_id"] for one in found] == ["0", "1"]
    for one, body in zip(found, bodies, strict=True):
        assert one["error"] is None
        assert one["response"]["status_code"] == 200
        answer = httpx.post(
            f"{server.url}{CHAT}", json=body, headers={"Authorization": "Bearer key-a"}
        ).json()
        told = one["response"]["body"]
        assert told["id"] == f"chatcmpl-{one['response']['request_id']}"
        for differs in ("id", "created"):
            del told[differs], answer[differs]
        assert told == answer
    assert client.files.retrieve(over.output_file_id).purpose == "batch_output"


def test_responses_are_answered_too(client: openai.OpenAI):
    body = {"input": "Hello", "max_output_tokens": 5, "store": False}
    batch = begin(client, line("r", body, "/v1/responses"), "/v1/responses")
    over = ended(client, batch.id)
    [found] = results(client, over.output_file_id)
    told = found["response"]["body"]
    assert told["object"] == "response"
    assert told["output"][0]["content"][0]["text"]


def test_embeddings_of_a_model_that_makes_none_are_errors_of_their_lines(client: openai.OpenAI):
    url = "/v1/embeddings"
    over = ended(client, begin(client, line("e", {"input": "Hello"}, url), url).id)
    [found] = results(client, over.error_file_id)
    assert found["response"]["status_code"] == 400
    assert over.request_counts.failed == 1


def test_a_broken_line_gets_its_own_error_and_the_others_run(client: openai.OpenAI):
    good = {"prompt": "Hello", "max_tokens": 2}
    lines = [
        line("good", good),
        b"{no json",
        b"",
        b'["a list"]',
        json.dumps({"method": "POST", "url": TEXT, "body": good}).encode(),
        line("good", good),  # repeated
        line("elsewhere", good, CHAT),
        line("get", good, method="GET"),
        line("streams", {**good, "stream": True}),
        line("more", good, priority=3),
        line("no body", 5),  # type: ignore[arg-type]
        line("wrong field", {**good, "max_tokns": 3}),
        line("other model", {**good, "model": "gpt-5"}),
        line("long", {"prompt": "x" * 600}),
        b'{"custom_id": "twice", "custom_id": "twice"}',
        b"\xff",
        line("background", {**good, "background": True}),
        line("last", good),
    ]
    over = ended(client, begin(client, b"\n".join(lines)).id)
    assert over.status == "completed"
    assert over.request_counts.to_dict() == {"total": 17, "completed": 2, "failed": 15}
    assert [one["custom_id"] for one in results(client, over.output_file_id)] == ["good", "last"]
    wrong = results(client, over.error_file_id)
    refused = {one["error"]["line"]: one for one in wrong if one["error"]}
    answered = {one["custom_id"]: one["response"] for one in wrong if one["response"]}
    assert sorted(refused) == [2, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16, 17]
    assert all(f"line {number}: " in one["error"]["message"] for number, one in refused.items())
    params = {number: one["error"]["param"] for number, one in refused.items()}
    assert params[5] == params[6] == "custom_id"
    assert (params[7], params[8], params[9]) == ("url", "method", "body.stream")
    assert (params[10], params[11], params[17]) == ("priority", "body", "body.background")
    assert refused[6]["error"]["code"] == "custom_id_repeated"
    assert "that of line 1" in refused[6]["error"]["message"]
    statuses = {id: response["status_code"] for id, response in answered.items()}
    assert statuses == {"wrong field": 400, "other model": 404, "long": 400}
    assert answered["wrong field"]["body"]["error"]["param"] == "max_tokns"


def test_lines_run_behind_all_others_and_in_their_tenants_cache(
    client: openai.OpenAI, server: ServerThread[FakeEngine]
):
    asked = server.engine.requests
    asked.clear()
    ended(client, begin(client, prompts(3)).id)
    client.completions.create(model="fake", prompt="Hello", max_tokens=2)
    *lines, interactive = asked
    assert [priority for _, _, priority, _ in lines] == [MAX_INT] * 3
    assert interactive[2] == 0
    assert {salt for *_, salt in asked} == {interactive[3]}


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "empty_file"), (b"\n \n", "empty_file"), (None, "too_many_lines")]
)
def test_a_file_that_is_no_batch_fails_as_a_whole(
    client: openai.OpenAI, content: bytes | None, code: str, monkeypatch: pytest.MonkeyPatch
):
    if content is None:
        monkeypatch.setattr(worker, "MAX_LINES", 3)
        content = prompts(4)
    over = ended(client, begin(client, content).id)
    assert over.status == "failed"
    assert [error.code for error in over.errors.data] == [code]
    assert over.output_file_id is None


def test_bad_batches_are_refused(client: openai.OpenAI, server: ServerThread[FakeEngine]):
    file = client.files.create(file=b"", purpose="batch")
    good = {"input_file_id": file.id, "endpoint": TEXT, "completion_window": "24h"}
    for change, status, param in (
        ({"input_file_id": "file-nope"}, 404, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, 400, "endpoint"),
        ({"completion_window": "soon"}, 400, "completion_window"),
        ({"completion_window": "0h"}, 400, "completion_window"),
        ({"completion_window": "31d"}, 400, "completion_window"),
        ({"metadata": {"a": 1}}, 400, "metadata.a"),
        ({"metadata": {str(i): "" for i in range(17)}}, 400, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 5}}, 400,
         "output_expires_after.seconds"),
        ({"speed": "high"}, 400, "speed"),
    ):  # fmt: skip
        answer = httpx.post(
            f"{server.url}/v1/batches",
            json={**good, **change},
            headers={"Authorization": "Bearer key-a"},
        )
        assert error_of(answer, status)["param"] == param
    client.files.delete(file.id)


def test_another_tenants_batch_is_not_there(
    client: openai.OpenAI, server: ServerThread[FakeEngine]
):
    batch = ended(client, begin(client, prompts(1)).id)
    with client_of(server.url, "key-b") as other:
        assert other.batches.list().data == []
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="there is no batch"):
                ask(batch.id)
        with pytest.raises(openai.NotFoundError):
            other.files.content(batch.output_file_id)
        wanted: Any = {"completion_window": "24h", "endpoint": TEXT}
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=batch.input_file_id, **wanted)


def test_batches_are_listed_in_pages(client: openai.OpenAI):
    ids = [begin(client, prompts(1)).id for _ in range(3)]
    for id in ids:
        ended(client, id)
    newest = [batch.id for batch in client.batches.list(limit=2)][:3]
    assert newest == ids[::-1]
    with pytest.raises(openai.NotFoundError):
        client.batches.list(after="batch_nope")


# -- while it runs -------------------------------------------------------------------------------


def start(
    start_server: StartServer, folder: Path, **options: Any
) -> tuple[ServerThread[FakeEngine], openai.OpenAI]:
    server = start_server(store_dir=str(folder), **options)
    return server, client_of(server.url, "none")


def test_a_batch_is_cancelled_with_what_is_done(start_server: StartServer, tmp_path: Path):
    server, client = start(start_server, tmp_path)
    server.engine.is_endless = True
    endless = begin(client, prompts(5, ignore_eos=True))
    wait_for(lambda: server.engine.num_running == 5)
    file = endless.input_file_id
    with pytest.raises(openai.ConflictError, match="cancel the batch first"):
        client.files.delete(file)
    assert client.batches.cancel(endless.id).status in ("cancelling", "cancelled")
    over = ended(client, endless.id)
    assert over.status == "cancelled"
    assert over.cancelling_at <= over.cancelled_at
    assert over.request_counts.total == 5
    assert server.engine.num_running == 0
    with pytest.raises(openai.ConflictError, match="only one that runs"):
        client.batches.cancel(endless.id)
    assert client.files.delete(file).deleted
    server.engine.is_endless = False
    assert ended(client, begin(client, prompts(3)).id).request_counts.completed == 3


def test_what_is_not_run_in_time_says_so(start_server: StartServer, tmp_path: Path):
    server, client = start(start_server, tmp_path)
    server.engine.is_silent = True
    batch = begin(client, prompts(3) + b"\n{broken", completion_window="1m")
    wait_for(lambda: server.engine.num_running == 3)
    server.server._state.store.clock = lambda: time.time() + 61
    over = ended(client, batch.id)
    assert over.status == "expired"
    assert over.request_counts.to_dict() == {"total": 4, "completed": 0, "failed": 4}
    codes = [one["error"]["code"] for one in results(client, over.error_file_id)]
    assert codes == ["batch_expired"] * 3 + ["bad_json"]


def test_lines_leave_room_for_others(
    start_server: StartServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(FakeEngine, "max_num_seqs", 8)
    server, client = start(start_server, tmp_path)
    server.engine.is_silent = True
    batch = begin(client, prompts(30))
    wait_for(lambda: server.engine.num_running == 7)
    client.models.list()
    assert server.engine.num_running == 7
    client.batches.cancel(batch.id)
    ended(client, batch.id)


def test_a_line_that_finds_no_room_waits(start_server: StartServer, tmp_path: Path):
    server, client = start(start_server, tmp_path)
    server.engine.error = OverloadedError("the queue is full")
    batch = begin(client, prompts(3))
    wait_for(lambda: len(server.engine.requests) >= 5)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    server.engine.error = None
    assert ended(client, batch.id).request_counts.completed == 3


def test_an_error_of_the_engine_is_the_lines_alone(start_server: StartServer, tmp_path: Path):
    server, client = start(start_server, tmp_path)
    server.engine.finish_reason = "error"
    over = ended(client, begin(client, prompts(2)).id)
    assert over.request_counts.failed == 2
    found = results(client, over.error_file_id)
    assert [one["response"]["status_code"] for one in found] == [500, 500]


def test_results_that_do_not_fit_wait_for_room(start_server: StartServer, tmp_path: Path):
    _, client = start(start_server, tmp_path, max_store_bytes=80_000)
    ballast = client.files.create(file=bytes(40_000), purpose="batch")
    batch = begin(client, prompts(60))
    wait_for(lambda: client.batches.retrieve(batch.id).request_counts.completed > 5)
    time.sleep(0.3)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    assert client.batches.retrieve(batch.id).request_counts.completed < 60
    client.files.delete(ballast.id)
    over = ended(client, batch.id)
    assert over.request_counts.completed == 60
    assert len(results(client, over.output_file_id)) == 60


def test_two_servers_of_one_store_share_batches_and_a_key_that_is_gone_waits(
    start_server: StartServer, tmp_path: Path
):
    first = start_server(store_dir=str(tmp_path), api_key=("key-a", "key-b"))
    first.engine.is_silent = True
    with client_of(first.url, "key-a") as a, client_of(first.url, "key-b") as b:
        ids = begin(a, prompts(3)).id, begin(b, prompts(3)).id
    wait_for(lambda: first.engine.num_running == 6)
    second = start_server(store_dir=str(tmp_path), api_key=("key-a",))
    with client_of(second.url, "key-a") as client:
        assert client.batches.retrieve(ids[0]).status == "in_progress"
        first.end()
        assert ended(client, ids[0]).request_counts.completed == 3
    assert len(second.engine.requests) == 3
    third = start_server(store_dir=str(tmp_path), api_key=("key-b",))
    with client_of(third.url, "key-b") as client:
        assert ended(client, ids[1]).request_counts.completed == 3


def test_without_a_folder_batches_are_refused(start_server: StartServer):
    server = start_server(store_dir=NOWHERE)
    body = {"input_file_id": "file-1", "endpoint": TEXT, "completion_window": "24h"}
    for answer in (
        httpx.post(f"{server.url}/v1/batches", json=body),
        httpx.get(f"{server.url}/v1/batches"),
        httpx.get(f"{server.url}/v1/batches/batch_1"),
        httpx.post(f"{server.url}/v1/batches/batch_1/cancel"),
    ):
        assert error_of(answer, 503)["code"] == "store_unavailable"


# -- parts ---------------------------------------------------------------------------------------


def test_metrics_tell_what_became_of_batches(start_server: StartServer, tmp_path: Path):
    server = start_server(store_dir=str(tmp_path))
    with client_of(server.url, "none") as one:
        content = prompts(3) + b"\n{broken"
        file = one.files.create(file=("in.jsonl", content), purpose="batch")
        made = one.batches.create(input_file_id=file.id, endpoint=TEXT, completion_window="24h")
        while one.batches.retrieve(made.id).status not in ENDS:
            time.sleep(0.05)
    deadline = time.monotonic() + 20
    wanted = {
        'octavo:batch_lines_total{outcome="completed"} 3.0',
        'octavo:batch_lines_total{outcome="failed"} 1.0',
        'octavo:batches_total{outcome="completed"} 1.0',
        "octavo:open_batches 0.0",
    }
    while not wanted <= set(httpx.get(f"{server.url}/metrics").text.splitlines()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
