"""A coding agent's session against a server: how much of its prompts comes from the prefix cache?

    octavo serve demo-moe &
    python -m benchmarks.agent_session [--url URL] [--turns 50] [--api messages] > session.json

Two agents in the manner of the two that are common: one speaks Anthropic's API (a billing header
that changes each time, marks of cache control that move, reminders of the system in between), the
other OpenAI's Responses without stored state. Both stream, call tools, send results, reasoning and
calls back as they came. Prints one JSON object; a turn whose share is low says what the server
explains of it, where that is asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx

SYSTEM = "You are an agent that works on the code of a project. " + " ".join(
    f"Rule {n}: look before you change file number {n}, and say what you did." for n in range(24)
)
PATHS = [f"src/part_{n}.py" for n in range(8)]
TOOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "read_file": ("Reads a file.", {"path": {"enum": PATHS}}),
    "search": ("Finds a word in files.", {"word": {"enum": ["def", "class"]}}),
    "run_tests": ("Runs tests.", {"path": {"enum": PATHS}, "quick": {"type": "boolean"}}),
}
QUESTION_EVERY = 10
"""Turns of tools until the user asks something new."""


def schema_of(parameters: dict[str, Any]) -> dict[str, Any]:
    required = list(parameters)
    return {
        "type": "object",
        "properties": parameters,
        "required": required,
        "additionalProperties": False,
    }


def result_of(turn: int) -> str:
    return f"turn {turn}: " + " ".join(f"line {turn * 7 + n} of it is fine;" for n in range(6))


def question_of(turn: int) -> str:
    return f"Now look at part {turn // QUESTION_EVERY} and tell me what is wrong with it."


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """What one request came to."""

    prompt_tokens: int
    cached_tokens: int
    num_calls: int
    explanation: dict[str, Any] | None = None

    @property
    def share(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class Agent(Protocol):
    """One session."""

    def ask(self, question: str) -> None:
        """The user says something."""
        ...

    def answer(self, *, calls_tools: bool, turn: int) -> Turn:
        """The model answers, and its calls get their results."""
        ...


def events_of(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Yields the data of server-sent events."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@dataclass(slots=True, kw_only=True)
class MessagesAgent:
    """The manner of Claude Code."""

    client: httpx.Client
    model: str
    max_tokens: int
    explains: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        text = {"type": "text", "text": question}
        self.messages.append({"role": "user", "content": [text]})

    def answer(self, *, calls_tools: bool, turn: int) -> Turn:
        body = self._body(calls_tools)
        explanation = self._explained(body) if self.explains else None
        message = self._streamed(body)
        self.messages.append({"role": "assistant", "content": message["content"]})
        calls = [block for block in message["content"] if block["type"] == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": call["id"], "content": result_of(turn + n)}
            for n, call in enumerate(calls)
        ]
        if results:
            self.messages.append({"role": "user", "content": results})
        if turn % 7 == 3:
            reminder = f"After turn {turn}: keep your list of tasks."
            self.messages.append({"role": "system", "content": reminder})
        usage = message["usage"]
        cached = usage["cache_read_input_tokens"]
        return Turn(
            prompt_tokens=usage["input_tokens"] + usage["cache_creation_input_tokens"] + cached,
            cached_tokens=cached,
            num_calls=len(calls),
            explanation=explanation,
        )

    def _body(self, calls_tools: bool) -> dict[str, Any]:
        header = f"x-anthropic-billing-header: cc_version=2.1.36; cch={secrets.token_hex(3)};"
        mark = {"cache_control": {"type": "ephemeral"}}
        messages = json.loads(json.dumps(self.messages))  # as any client would
        for message in messages[-2:]:
            if isinstance(message["content"], list) and message["content"]:
                message["content"][-1] |= mark
        return {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "system": [
                {"type": "text", "text": header},
                {"type": "text", "text": SYSTEM, **mark},
            ],
            "messages": messages,
            "tools": [
                {"name": name, "description": said, "input_schema": schema_of(parameters)}
                for name, (said, parameters) in TOOLS.items()
            ],
            "tool_choice": {
                "type": "any" if calls_tools else "none",
                "disable_parallel_tool_use": True,
            },
            "metadata": {"user_id": "someone"},
            "temperature": 0.7,
            "seed": len(messages),
            "stream": True,
        }

    def _explained(self, body: dict[str, Any]) -> dict[str, Any]:
        response = self.client.post("/v1/messages/explain", json=body)
        response.raise_for_status()
        return response.json()

    def _streamed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the message that a stream adds up to, calls parsed, as the client's library."""
        message: dict[str, Any] = {}
        pieces: dict[int, str] = {}
        with self.client.stream("POST", "/v1/messages", json=body) as response:
            if response.is_error:
                raise RuntimeError(response.read().decode())
            for event in events_of(response):
                match event["type"]:
                    case "message_start":
                        message = event["message"]
                    case "content_block_start":
                        message["content"].append(event["content_block"])
                        pieces[event["index"]] = ""
                    case "content_block_delta":
                        self._add(message["content"][event["index"]], event, pieces)
                    case "message_delta":
                        message |= event["delta"]
                        message["usage"] = event["usage"]
                    case "error":
                        raise RuntimeError(event["error"]["message"])
        for index, block in enumerate(message["content"]):
            if block["type"] == "tool_use":
                block["input"] = json.loads(pieces[index] or "{}")
        return message

    @staticmethod
    def _add(block: dict[str, Any], event: dict[str, Any], pieces: dict[int, str]) -> None:
        delta = event["delta"]
        if delta["type"] == "input_json_delta":
            pieces[event["index"]] += delta["partial_json"]
        else:
            name = delta["type"].removesuffix("_delta")
            block[name] += delta[name]


@dataclass(slots=True, kw_only=True)
class ResponsesAgent:
    """The manner of Codex: nothing is stored, all items go back each time."""

    client: httpx.Client
    model: str
    max_tokens: int
    explains: bool = False
    items: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, question: str) -> None:
        content = [{"type": "input_text", "text": question}]
        self.items.append({"type": "message", "role": "user", "content": content})

    def answer(self, *, calls_tools: bool, turn: int) -> Turn:
        response = self._streamed(self._body(calls_tools))
        self.items += response["output"]
        calls = [one for one in response["output"] if one["type"] == "function_call"]
        for n, call in enumerate(calls):
            output = {"call_id": call["call_id"], "output": result_of(turn + n)}
            self.items.append({"type": "function_call_output", **output})
        usage = response["usage"]
        return Turn(
            prompt_tokens=usage["input_tokens"],
            cached_tokens=usage["input_tokens_details"]["cached_tokens"],
            num_calls=len(calls),
        )

    def _body(self, calls_tools: bool) -> dict[str, Any]:
        return {
            "model": self.model,
            "instructions": SYSTEM,
            "input": json.loads(json.dumps(self.items)),
            "tools": [
                {
                    "type": "function",
                    "name": name,
                    "description": said,
                    "parameters": schema_of(parameters),
                    "strict": False,
                }
                for name, (said, parameters) in TOOLS.items()
            ],
            "tool_choice": "required" if calls_tools else "none",
            "parallel_tool_calls": False,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "session",
            "max_output_tokens": self.max_tokens,
            "temperature": 0.7,
            "seed": len(self.items),
            "store": False,
            "stream": True,
        }

    def _streamed(self, body: dict[str, Any]) -> dict[str, Any]:
        last: dict[str, Any] = {}
        with self.client.stream("POST", "/v1/responses", json=body) as response:
            if response.is_error:
                raise RuntimeError(response.read().decode())
            for event in events_of(response):
                last = event
        if last["type"] not in ("response.completed", "response.incomplete"):
            raise RuntimeError(json.dumps(last))
        return last["response"]


AGENTS: dict[str, type[MessagesAgent] | type[ResponsesAgent]] = {
    "messages": MessagesAgent,
    "responses": ResponsesAgent,
}


def play(agent: Agent, num_turns: int) -> list[Turn]:
    """Returns the turns of a session: a question, calls of tools, an answer, another question."""
    turns = []
    for turn in range(num_turns):
        if turn % QUESTION_EVERY == 0:
            agent.ask(question_of(turn))
        is_last = turn % QUESTION_EVERY == QUESTION_EVERY - 1
        turns.append(agent.answer(calls_tools=not is_last, turn=turn))
    return turns


def share_after_second(turns: list[Turn]) -> float:
    """Returns the cached share of all prompt tokens after the second turn."""
    later = turns[2:]
    return sum(one.cached_tokens for one in later) / sum(one.prompt_tokens for one in later)


def report(turns: list[Turn]) -> dict[str, Any]:
    """Returns the figures of a session."""
    growth = [b.prompt_tokens - a.prompt_tokens for a, b in itertools.pairwise(turns)]
    worst = min(range(2, len(turns)), key=lambda place: turns[place].share)
    found = {
        "turns": len(turns),
        "calls": sum(one.num_calls for one in turns),
        "prompt_tokens": sum(one.prompt_tokens for one in turns),
        "cached_tokens": sum(one.cached_tokens for one in turns),
        "last_prompt_tokens": turns[-1].prompt_tokens,
        "new_tokens_a_turn": sum(growth) / len(growth),
        "computed_tokens_a_turn": sum(t.prompt_tokens - t.cached_tokens for t in turns[2:])
        / len(turns[2:]),
        "share_after_second": share_after_second(turns),
        "worst_turn": worst,
        "worst_share": turns[worst].share,
    }
    reasons = [one.explanation["reason"] for one in turns if one.explanation is not None]
    if reasons:
        found["reasons"] = {reason: reasons.count(reason) for reason in sorted(set(reasons))}
        found["worst_explanation"] = turns[worst].explanation
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="demo-moe")
    parser.add_argument("--key", default="none")
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--api", choices=[*AGENTS], action="append")
    parser.add_argument("--explain", action="store_true", help="ask before each turn")
    args = parser.parse_args()
    found = {}
    headers = {"Authorization": f"Bearer {args.key}"}
    with httpx.Client(base_url=args.url, timeout=600, headers=headers) as client:
        for api in args.api or AGENTS:
            agent = AGENTS[api](
                client=client, model=args.model, max_tokens=args.max_tokens, explains=args.explain
            )
            found[api] = report(play(agent, args.turns))
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
