"""Stored responses over real sockets: conversations, tenants, several front processes, the end."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.errors import EngineDeadError
from tests.server.conftest import ServerThread
from tests.server.noting_engine import NotingEngine
from tests.server.response_events import checked, parsed
from tests.server.response_tools import ANSWER, TOOLS
from tests.server.stored_calls import KEYS, PATH, UNKNOWN, ask, client_of, wait_until

Servers = list[ServerThread[NotingEngine]]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two servers over one store, as two front processes are."""
    folder = str(tmp_path_factory.mktemp("store"))
    config = ServerConfig(port=0, api_key=KEYS, store_dir=folder, shutdown_timeout=1.0)
    found = [ServerThread(NotingEngine(), config) for _ in range(2)]
    yield found
    for server in found:
        server.end()


@pytest.fixture
def engine(servers: Servers) -> Iterator[NotingEngine]:
    """The engine of the first server, with the script that most tests want."""
    engine = servers[0].engine
    yield engine
    engine.answer, engine.is_endless, engine.error_after = "Hello.", False, None


@pytest.fixture
def client(servers: Servers) -> Iterator[openai.OpenAI]:
    with client_of(servers[0]) as strict:
        yield strict


@pytest.fixture
def other(servers: Servers) -> Iterator[openai.OpenAI]:
    """The same client at the other server."""
    with client_of(servers[1]) as strict:
        yield strict


def test_a_stored_response_is_found_at_every_server_until_it_is_deleted(
    client: openai.OpenAI, other: openai.OpenAI
) -> None:
    made = ask(client, metadata={"a": "b"})
    assert made.store
    for one in (client, other):
        assert one.responses.retrieve(made.id) == made
    other.responses.delete(made.id)
    for one in (client, other):
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.delete(made.id)


def test_a_conversation_goes_on_at_any_server(
    servers: Servers, engine: NotingEngine, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    engine.answer = ANSWER
    first = ask(client, "How warm is Rome?", instructions="Be kind.", tools=TOOLS)
    call = first.output[2]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    ask(client, [{"role": "user", "content": "How warm is Rome?"}, *first.output, result])
    whole = engine.tokenizer.prompt
    assert "Be kind." not in whole
    second = ask(other, [result], previous_response_id=first.id)
    assert servers[1].engine.tokenizer.prompt == whole
    assert second.previous_response_id == first.id
    # A text, and instructions of its own.
    ask(client, "And now?", previous_response_id=second.id, instructions="Be brief.")
    expected = f"system:Be brief.\n{whole.removesuffix('assistant:')}"
    expected += "assistant:Hello.\nuser:And now?\nassistant:"
    assert engine.tokenizer.prompt == expected


def test_a_long_conversation_comes_to_the_same_as_one_that_is_sent(
    engine: NotingEngine, client: openai.OpenAI
) -> None:
    turns: list[Any] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first = ask(client, turns * 200)
    ask(client, "c", previous_response_id=first.id)
    expected = "user:a\nassistant:b\n" * 200 + "assistant:Hello.\nuser:c\nassistant:"
    assert engine.tokenizer.prompt == expected
    second = ask(client, turns * 200, previous_response_id=ask(client, "x").id)
    assert engine.tokenizer.prompt.startswith("user:x\nassistant:Hello.\nuser:a\n")
    assert len(list(client.responses.input_items.list(second.id, limit=100))) == 400


def test_items_are_named_by_their_ids(engine: NotingEngine, client: openai.OpenAI) -> None:
    first = ask(client)
    named: Any = {"type": "item_reference", "id": first.output[0].id}
    for reference in (named, {"id": named["id"]}):
        ask(
            client, [{"role": "user", "content": "Hi"}, reference, {"role": "user", "content": "?"}]
        )
        assert engine.tokenizer.prompt == "user:Hi\nassistant:Hello.\nuser:?\nassistant:"
    for wrong in ("msg_1", f"msg_{'0' * 32}_0", first.output[0].id[:-1] + "7"):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, [{"type": "item_reference", "id": wrong}])
        assert refused.value.code == "item_not_found"


def test_input_items_are_listed_page_by_page(client: openai.OpenAI) -> None:
    thought = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "Hm."}]}
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    items: list[Any] = [
        {"role": "user", "content": "Hi"},
        {**thought, "summary": []},
        call,
        {"type": "function_call_output", "call_id": "1", "output": "21"},
        {"role": "assistant", "content": "Hello."},
    ]
    made = ask(client, items)
    listed = list(client.responses.input_items.list(made.id, order="asc", limit=2))
    kinds = ["message", "reasoning", "function_call", "function_call_output", "message"]
    assert [one.type for one in listed] == kinds
    assert len({one.id for one in listed}) == 5
    assert [one.id for one in client.responses.input_items.list(made.id)] == [
        one.id for one in reversed(listed)
    ]
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(made.id, after="msg_1")


def test_a_response_is_its_tenants_alone(servers: Servers, client: openai.OpenAI) -> None:
    made = ask(client)
    with client_of(servers[1], "key-b") as stranger:
        calls: list[Callable[[], Any]] = [
            lambda: stranger.responses.retrieve(made.id),
            lambda: stranger.responses.delete(made.id),
            lambda: stranger.responses.cancel(made.id),
            lambda: stranger.responses.input_items.list(made.id),
            lambda: ask(stranger, previous_response_id=made.id),
            lambda: ask(stranger, [{"type": "item_reference", "id": made.output[0].id}]),
        ]
        for call in calls:
            with pytest.raises(openai.NotFoundError):
                call()
    assert client.responses.retrieve(made.id) == made


@pytest.mark.parametrize("response_id", [UNKNOWN, "resp_1", "front%2F0", "a" * 64])
def test_an_unknown_response_is_a_404(servers: Servers, response_id: str) -> None:
    headers = {"Authorization": "Bearer key-a"}
    url = f"{servers[0].url}{PATH}"
    answers = [
        httpx.get(f"{url}/{response_id}", headers=headers),
        httpx.delete(f"{url}/{response_id}", headers=headers),
        httpx.post(f"{url}/{response_id}/cancel", headers=headers),
        httpx.get(f"{url}/{response_id}/input_items", headers=headers),
        httpx.post(url, headers=headers, json={"input": "Hi", "previous_response_id": response_id}),
    ]
    assert [answer.status_code for answer in answers] == [404] * 5


def test_a_conversation_whose_beginning_is_gone_says_so(client: openai.OpenAI) -> None:
    first = ask(client)
    second = ask(client, previous_response_id=first.id)
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="send the whole conversation") as refused:
        ask(client, previous_response_id=second.id)
    assert refused.value.param == "previous_response_id"


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    made = ask(client, store=False)
    assert not made.store
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_wrong_item_is_named_as_it_was_sent(client: openai.OpenAI) -> None:
    first = ask(client, [{"role": "user", "content": "a"}] * 3)
    wrong: list[Any] = [{"role": "user", "content": [{"type": "input_image"}]}]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, wrong, previous_response_id=first.id)
    assert refused.value.param == "input[0].content[0]"


def replayed(server: ServerThread[Any], response_id: str, query: str = "") -> list[dict[str, Any]]:
    url = f"{server.url}{PATH}/{response_id}?stream=true{query}"
    answer = httpx.get(url, headers={"Authorization": "Bearer key-a"}, timeout=30)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return parsed(answer.text)


def test_a_stored_response_is_streamed_again_from_any_event(
    servers: Servers, engine: NotingEngine, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    engine.answer = ANSWER
    made = ask(client, tools=TOOLS, include=["reasoning.encrypted_content"])
    events = replayed(servers[1], made.id)
    assert checked(events) == json.loads(other.responses.with_raw_response.retrieve(made.id).text)
    assert {"message", "reasoning", "function_call"} <= {one.type for one in made.output}
    for after in (0, 3, len(events) - 2):
        rest = replayed(servers[0], made.id, f"&starting_after={after}")
        assert rest == events[after + 1 :]
    with other.responses.retrieve(made.id, stream=True, starting_after=1) as stream:
        assert [event.sequence_number for event in stream] == list(range(2, len(events)))


def test_a_response_that_is_being_made_is_waited_for(
    servers: Servers, engine: NotingEngine, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    engine.is_endless, engine.answer = True, None
    made = ask(client, background=True)
    with other.responses.retrieve(made.id, stream=True) as stream:
        kinds = [next(stream).type for _ in range(2)]
        other.responses.cancel(made.id)
        kinds += [event.type for event in stream]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"


@pytest.mark.parametrize(
    "query", ["stream=maybe", "starting_after=3", "stream=true&starting_after=-1"]
)
def test_a_replay_that_cannot_be_is_refused(
    servers: Servers, client: openai.OpenAI, query: str
) -> None:
    made = ask(client)
    url = f"{servers[0].url}{PATH}/{made.id}?{query}"
    answer = httpx.get(url, headers={"Authorization": "Bearer key-a"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("stream", "starting_after")


def test_a_stream_is_stored_before_its_last_event(servers: Servers) -> None:
    headers = {"Authorization": "Bearer key-a"}
    body = {"input": "Hi", "stream": True}
    last = checked(parsed(httpx.post(f"{servers[0].url}{PATH}", json=body, headers=headers).text))
    found = httpx.get(f"{servers[1].url}{PATH}/{last['id']}", headers=headers).json()
    assert found == last


def test_a_stream_whose_client_leaves_is_stored_as_cancelled(
    servers: Servers, engine: NotingEngine, other: openai.OpenAI
) -> None:
    engine.is_endless, engine.answer = True, None
    headers = {"Authorization": "Bearer key-a"}
    body = {"input": "Hi", "stream": True}
    url = f"{servers[0].url}{PATH}"
    with httpx.stream("POST", url, json=body, headers=headers) as stream:
        lines = stream.iter_lines()
        created = next(line for line in lines if line.startswith("data: "))
        response_id = json.loads(created.removeprefix("data: "))["response"]["id"]
        assert other.responses.retrieve(response_id).status == "in_progress"
        with pytest.raises(openai.BadRequestError):
            ask(other, previous_response_id=response_id)
    wait_until(lambda: other.responses.retrieve(response_id).status == "cancelled")
    assert other.responses.retrieve(response_id).output_text


def test_a_stream_that_fails_is_stored_as_failed(
    servers: Servers, engine: NotingEngine, other: openai.OpenAI
) -> None:
    engine.error_after = (3, EngineDeadError("the engine process ended"))
    headers = {"Authorization": "Bearer key-a"}
    body = {"input": "Hi", "stream": True}
    last = checked(parsed(httpx.post(f"{servers[0].url}{PATH}", json=body, headers=headers).text))
    wait_until(lambda: other.responses.retrieve(last["id"]).status == "failed")
    assert other.responses.retrieve(last["id"]).error is not None


@pytest.mark.parametrize("place", [0, 1])
def test_a_response_in_the_background_is_cancelled_at_any_server(
    servers: Servers, engine: NotingEngine, client: openai.OpenAI, place: int
) -> None:
    engine.is_endless, engine.answer = True, None
    engine.aborted.clear()
    made = ask(client, background=True)
    assert (made.status, made.background) == ("in_progress", True)
    with client_of(servers[place]) as at:
        ended = at.responses.cancel(made.id)
        assert ended.status == "cancelled"
        with pytest.raises(openai.ConflictError):
            at.responses.cancel(made.id)
    assert engine.aborted.wait(10)
    assert client.responses.retrieve(made.id) == ended


def test_a_response_in_the_background_ends_by_itself_too(
    engine: NotingEngine, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    made = ask(client, background=True)
    wait_until(lambda: other.responses.retrieve(made.id).status != "in_progress")
    assert other.responses.retrieve(made.id).output_text == "Hello."
    engine.error_after = (2, EngineDeadError("the engine process ended"))
    made = ask(client, background=True)
    wait_until(lambda: other.responses.retrieve(made.id).status == "failed")


def test_a_client_that_waits_learns_that_another_cancelled(
    servers: Servers, engine: NotingEngine
) -> None:
    engine.is_endless, engine.answer = True, None
    headers = {"Authorization": "Bearer key-a"}
    url = f"{servers[0].url}{PATH}"
    events: list[str] = []
    with httpx.stream("POST", url, json={"input": "Hi", "stream": True}, headers=headers) as stream:
        for line in stream.iter_lines():
            events.append(line)
            if len(events) == 2:
                told = json.loads(line.removeprefix("data: "))["response"]["id"]
                answer = httpx.post(f"{servers[1].url}{PATH}/{told}/cancel", headers=headers)
                assert answer.json()["status"] == "cancelled"
    assert "event: response.incomplete" in events
    assert json.loads(events[-2].removeprefix("data: "))["response"]["status"] == "cancelled"


def test_deleting_ends_what_is_being_made(
    servers: Servers, engine: NotingEngine, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    engine.is_endless, engine.answer = True, None
    engine.aborted.clear()
    made = ask(client, background=True)
    other.responses.delete(made.id)
    assert engine.aborted.wait(10)
    time.sleep(0.1)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


async def test_the_async_client_keeps_a_conversation(servers: Servers) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{servers[0].url}/v1",
        api_key="key-a",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        made = await client.responses.create(model="fake", input="Hi")
        async with client.responses.stream(
            model="fake", input="And?", previous_response_id=made.id
        ) as stream:
            final = await stream.get_final_response()
        assert await client.responses.retrieve(final.id)
        await client.responses.delete(made.id)
        found = await asyncio.gather(
            *(client.responses.retrieve(one) for one in (made.id, final.id)),
            return_exceptions=True,
        )
        assert isinstance(found[0], openai.NotFoundError)
        assert not isinstance(found[1], BaseException)
