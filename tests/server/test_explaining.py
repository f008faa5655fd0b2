"""Why a prompt is cached as far as it is, asked of a real engine by two tenants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from octavo.async_llm import AsyncLLM
from octavo.config import ServerConfig
from tests.server.conftest import ServerThread
from tests.server.tiny_engine import tiny_engine

TEXT = "/v1/completions"
EXPLAIN = "/v1/cache/explain"
IDS = [*range(20, 60)] * 2
"""Token ids, none of which ends an answer."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[AsyncLLM]]:
    config = ServerConfig(port=0, api_key=("ours", "theirs"), operator_key=("boss",))
    found: ServerThread[AsyncLLM] = ServerThread(tiny_engine(tmp_path_factory.mktemp("e")), config)
    yield found
    found.end()


Post = Any


@pytest.fixture
def post(server: ServerThread[AsyncLLM]) -> Iterator[Post]:
    with httpx.Client(base_url=server.url) as http:

        def send(path: str, key: str = "ours", **body: Any) -> dict[str, Any]:
            response = http.post(path, json=body, headers={"Authorization": f"Bearer {key}"})
            assert response.status_code == 200, response.text
            return response.json()

        send("/reset_prefix_cache", key="boss")
        yield send


def test_a_prompt_is_new_and_then_cached_as_far_as_can_be(post: Post) -> None:
    before = post(EXPLAIN, prompt=IDS)
    assert (before["reason"], before["cached_tokens"], before["num_tokens"]) in (
        ("new", 0, 80),
        ("evicted", 0, 80),
    )
    post(TEXT, prompt=IDS, max_tokens=2)
    after = post(EXPLAIN, prompt=IDS)
    assert (after["reason"], after["cached_tokens"], after["block_size"]) == ("whole", 64, 16)
    usage = post(TEXT, prompt=IDS, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == after["cached_tokens"]


def test_the_token_is_named_at_which_a_prompt_parts(post: Post) -> None:
    post(TEXT, prompt=IDS, max_tokens=2)
    changed = [*IDS]
    changed[37] = 19
    found = post(EXPLAIN, prompt=changed)
    assert (found["reason"], found["cached_tokens"]) == ("parts", 32)
    assert found["nearest"]["shared_tokens"] == 37
    assert found["nearest"]["num_tokens"] >= 81
    parts = found["parts_at"]
    assert parts["token"] == 37

    def text(ids: list[int]) -> str:
        return post("/detokenize", tokens=ids)["prompt"]

    assert parts["before"] == text(IDS[5:37])
    assert parts["prompt"] == text(changed[37:69])
    assert parts["cached"] == text(IDS[37:69])


def test_a_conversation_goes_on_where_its_answer_ended(post: Post) -> None:
    answer = post(TEXT, prompt=IDS, max_tokens=20, ignore_eos=True, return_token_ids=True)
    told = answer["choices"][0]["token_ids"]
    found = post(EXPLAIN, prompt=[*IDS, *told, *range(30, 50)])
    assert (found["reason"], found["cached_tokens"]) == ("goes_on", 96)
    assert found["nearest"] == {"num_tokens": 100, "shared_tokens": 100}


def test_another_salt_of_the_same_key_is_told_and_other_keys_never_are(post: Post) -> None:
    post(TEXT, prompt=IDS, max_tokens=2, cache_salt="one")
    found = post(EXPLAIN, prompt=IDS, cache_salt="two")
    assert (found["reason"], found["other_salt_tokens"]) == ("other_salt", 80)
    assert found["parts_at"] is None
    assert post(EXPLAIN, prompt=IDS, cache_salt="one")["reason"] == "whole"
    for salt in ("one", "two"):
        theirs = post(EXPLAIN, key="theirs", prompt=IDS, cache_salt=salt)
        assert theirs["reason"] in ("new", "evicted")
        assert theirs["nearest"] is theirs["parts_at"] is theirs["other_salt_tokens"] is None
        assert theirs["cached_tokens"] == 0


def test_what_was_cached_and_is_not_any_more_is_told(post: Post) -> None:
    post(TEXT, prompt=IDS, max_tokens=2)
    post("/reset_prefix_cache", key="boss")
    assert post(EXPLAIN, prompt=IDS)["reason"] == "evicted"


def test_prompts_that_cannot_be_cached_say_so(post: Post) -> None:
    assert post(EXPLAIN, prompt=IDS[:16])["reason"] == "too_short"
    assert post(EXPLAIN, prompt=IDS, prefix_caching="off")["reason"] == "off"


def test_chats_and_messages_are_explained_as_they_are_answered(post: Post) -> None:
    messages = [{"role": "user", "content": "A long enough question about this and that."}]
    post("/v1/chat/completions", messages=messages, max_tokens=2)
    assert post(EXPLAIN, messages=messages)["reason"] == "whole"
    assert post("/v1/messages/explain", messages=messages, max_tokens=2)["reason"] == "whole"
    system = "This is another beginning."
    other = post("/v1/messages/explain", messages=messages, max_tokens=2, system=system)
    assert other["reason"] == "parts"
    assert other["parts_at"]["prompt"].startswith("system")
    assert other["parts_at"]["cached"].startswith("user")


def test_what_cannot_be_explained_is_refused(server: ServerThread[AsyncLLM]) -> None:
    headers = {"Authorization": "Bearer ours"}

    def error(path: str, **body: Any) -> dict[str, Any]:
        response = httpx.post(server.url + path, json=body, headers=headers)
        assert response.status_code == 400
        return response.json()["error"]

    assert error(EXPLAIN, prompt=[[1, 2], [3]])["param"] == "prompt"
    assert error(EXPLAIN, prompt=[1] * 600)["code"] == "context_length_exceeded"
    assert error(EXPLAIN, prompt=[99_999])["param"] == "prompt"
    assert error("/v1/messages/explain", messages=[])["type"] == "invalid_request_error"
