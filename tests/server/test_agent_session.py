"""Sessions of coding agents: every prompt begins with the one before, and is found in the cache."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.agent_session import AGENTS, Turn, play, report
from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from octavo.engine.chat_template import ChatRenderer
from octavo.outputs import OutputDelta
from octavo.server.call import Call
from octavo.server.exchange import Exchange
from octavo.server.message_answers import MessageHead, whole_message
from octavo.server.protocol.messages import MessagesRequest
from octavo.tools.answers import reading_of
from octavo.tools.detect import answer_format
from tests.server.conftest import ServerThread
from tests.server.templates import THINKS
from tests.server.tiny_engine import CONFIG, write_model

TURNS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerThread[AsyncLLM]]:
    folder = write_model(tmp_path_factory.mktemp("agent"))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"max_position_embeddings": 16384}))
    engine = AsyncLLM(
        EngineConfig(
            model=str(folder),
            load_format="dummy",
            dtype="float32",
            device="cpu",
            kv_cache_memory_bytes=64 * 2**20,
            num_threads=1,
        ),
        log_level="warning",
    )
    found: ServerThread[AsyncLLM] = ServerThread(
        engine, ServerConfig(port=0, served_model_name=("demo-moe",))
    )
    yield found
    found.end()


@pytest.fixture(params=[*AGENTS])
def turns(request: pytest.FixtureRequest, server: ServerThread[AsyncLLM]) -> list[Turn]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        agent = AGENTS[request.param](client=client, model="demo-moe", max_tokens=200)
        return play(agent, TURNS)


def test_each_turn_finds_the_prompt_of_the_turn_before(turns: list[Turn]) -> None:
    assert sum(turn.num_calls for turn in turns) >= TURNS - 3
    for before, turn in itertools.pairwise(turns):
        # The last block of a prompt may have merged with what follows.
        assert turn.cached_tokens > before.prompt_tokens - 32
    found = report(turns)
    assert found["share_after_second"] > 0.8
    assert found["cached_tokens"] == sum(turn.cached_tokens for turn in turns)


FORMAT = answer_format("<tool_call> <think> </think>", {})
READ = {"name": "read", "input_schema": {"properties": {"path": {"type": "string"}}}}


class ThinkingSession:
    """An agent that speaks Anthropic's API, and a model whose words are given."""

    def __init__(self, display: str) -> None:
        self._renderer = ChatRenderer(THINKS, {}, ())
        self._display = display
        self.messages: list[dict[str, Any]] = []

    def prompt(self) -> str:
        thinking = {"type": "adaptive", "display": self._display}
        fields = {"max_tokens": 99, "tools": [READ], "thinking": thinking}
        messages = json.loads(json.dumps(self.messages))
        body = MessagesRequest.model_validate({**fields, "messages": messages})
        return body.chat().render(self._renderer).text

    def answer(self, text: str) -> None:
        body = MessagesRequest.model_validate(
            {"max_tokens": 99, "tools": [READ], "messages": self.messages}
        )
        head = MessageHead(
            call=Call(id="a", created=0, params=None, requests=(), exchange=Exchange("a")),  # type: ignore[arg-type]
            model="any",
            reading=reading_of(FORMAT, body.chat().tool_set(), self.prompt()),
            hides_thinking=self._display == "omitted",
            max_tokens=99,
        )
        message = whole_message(head, OutputDelta(index=0, text=text, finish_reason="stop"))
        self.messages.append({"role": "assistant", "content": message["content"]})
        results = [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "It says no."}
            for block in message["content"]
            if block["type"] == "tool_use"
        ]
        if results:
            self.messages.append({"role": "user", "content": results})


@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_thinking_and_arguments_come_back_in_the_words_of_the_model(display: str) -> None:
    session = ThinkingSession(display)
    session.messages.append({"role": "user", "content": "What does it say?"})
    for turn in range(6):
        before = session.prompt()
        call = f'{{"name": "read", "arguments": {{"path": "\u00e9/{turn}", "n": [1, 2.5]}}}}'
        text = f"<think>\nTurn {turn}.\n</think>\n\nLook.\n<tool_call>\n{call}\n</tool_call>"
        session.answer(text)
        assert session.prompt().startswith(before + text)
    last = session.prompt()
    session.messages.append({"role": "user", "content": "And now?"})
    # The template drops what was thought before: that is where the prompts part.
    parted = session.prompt()
    same = next(n for n in range(len(last)) if last[n] != parted[n])
    assert last[:same].endswith("<|im_start|>assistant\n")
    assert last[same:].startswith("<think>\nTurn 0.")


def test_a_session_is_reported() -> None:
    turns = [Turn(prompt_tokens=n * 100, cached_tokens=n * 90, num_calls=1) for n in (1, 2, 3, 4)]
    found = report(turns)
    assert found["share_after_second"] == pytest.approx(0.9)
    assert (found["worst_turn"], found["new_tokens_a_turn"]) == (2, 100)
