"""Frameworks that applications are written in, against a server of the demo model: do they work?

    make clients

Runs in an environment of its own (.venv-clients), starts `octavo serve`, and prints a table of
chat, stream, tools and structured output by framework. Ends with 1 if anything fails.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

MODEL = "demo"
QUESTION = "How warm is it in Rome?"
KEY = "none"
Probe = Callable[[str], None]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo"]
    degrees: int


TOOL = {
    "type": "function",
    "function": {
        "name": "degrees_of",
        "description": "How warm it is in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


def check(holds: object, what: object) -> None:
    if not holds:
        raise AssertionError(f"got {what!r}")


class LangChain:
    package = "langchain-openai"

    def __init__(self, url: str) -> None:
        from langchain_openai import ChatOpenAI

        self._chat = ChatOpenAI(
            model=MODEL, base_url=url, api_key=KEY, max_tokens=80, max_retries=0, seed=1
        )

    def chat(self) -> None:
        answer = self._chat.invoke(QUESTION)
        check(answer.text and answer.usage_metadata["output_tokens"], answer)

    def stream(self) -> None:
        pieces = [piece.text for piece in self._chat.stream(QUESTION)]
        check(len([piece for piece in pieces if piece]) > 3, pieces)

    def tools(self) -> None:
        from langchain_core.messages import HumanMessage, ToolMessage

        messages: list[Any] = [HumanMessage(QUESTION)]
        message = self._chat.bind_tools([TOOL], tool_choice="required").invoke(messages)
        check(message.tool_calls, message)
        messages.append(message)
        for call in message.tool_calls:
            check(call["args"]["city"] in ("Rome", "Oslo"), call)
            messages.append(ToolMessage("21 degrees", tool_call_id=call["id"]))
        check(self._chat.invoke(messages).text, messages)

    def structured(self) -> None:
        for method in ("json_schema", "function_calling"):
            found = self._chat.with_structured_output(Weather, method=method).invoke(QUESTION)
            check(isinstance(found, Weather), found)


class LiteLLM:
    package = "litellm"

    def __init__(self, url: str) -> None:
        self._given: dict[str, Any] = {
            "model": f"hosted_vllm/{MODEL}",
            "api_base": url,
            "api_key": KEY,
            "max_tokens": 80,
            "messages": [{"role": "user", "content": QUESTION}],
        }

    def _ask(self, **more: Any) -> Any:
        import litellm

        return litellm.completion(**self._given | more)

    def chat(self) -> None:
        answer = self._ask()
        check(answer.choices[0].message.content and answer.usage.completion_tokens, answer)

    def stream(self) -> None:
        pieces = [chunk.choices[0].delta.content for chunk in self._ask(stream=True)]
        check(len([piece for piece in pieces if piece]) > 3, pieces)

    def tools(self) -> None:
        import litellm

        chunks = list(self._ask(tools=[TOOL], tool_choice="required", stream=True))
        message = litellm.stream_chunk_builder(chunks).choices[0].message
        check(message.tool_calls, message)
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}
            for call in message.tool_calls
        ]
        messages = [*self._given["messages"], message.model_dump(exclude_none=True), *results]
        answer = self._ask(messages=messages, tools=[TOOL], tool_choice="none")
        check(answer.choices[0].message.content, answer)

    def structured(self) -> None:
        text = self._ask(response_format=Weather).choices[0].message.content
        Weather.model_validate_json(text)


class LlamaIndex:
    package = "llama-index-llms-openai-like"

    def __init__(self, url: str) -> None:
        from llama_index.core.llms import ChatMessage
        from llama_index.llms.openai_like import OpenAILike

        self._messages = [ChatMessage(role="user", content=QUESTION)]
        self._llm = OpenAILike(
            model=MODEL,
            api_base=url,
            api_key=KEY,
            max_tokens=80,
            is_chat_model=True,
            is_function_calling_model=True,
            context_window=2048,
            max_retries=0,
        )

    def chat(self) -> None:
        answer = self._llm.chat(self._messages)
        check(answer.message.content, answer)
        check(self._llm.complete(QUESTION).text, "no completion")

    def stream(self) -> None:
        pieces = [one.delta for one in self._llm.stream_chat(self._messages)]
        check(len([piece for piece in pieces if piece]) > 3, pieces)

    def tools(self) -> None:
        from llama_index.core.tools import FunctionTool

        def degrees_of(city: str) -> str:
            """How warm it is in a city."""
            return f"21 degrees in {city}"

        answer = self._llm.predict_and_call(
            [FunctionTool.from_defaults(degrees_of)],
            user_msg=QUESTION,
            tool_required=True,
            allow_parallel_tool_calls=False,
        )
        check(answer.response.startswith("21 degrees in"), answer)

    def structured(self) -> None:
        from llama_index.core.prompts import PromptTemplate

        found = self._llm.structured_predict(Weather, PromptTemplate(QUESTION))
        check(isinstance(found, Weather), found)


class Instructor:
    package = "instructor"

    def __init__(self, url: str) -> None:
        import openai

        self._client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0)

    def _ask(self, mode: Any, **more: Any) -> Any:
        import instructor

        return instructor.from_openai(self._client, mode=mode).chat.completions.create(
            model=MODEL,
            max_tokens=80,
            max_retries=0,
            messages=[{"role": "user", "content": QUESTION}],
            **more,
        )

    def chat(self) -> None:
        import instructor

        answer = self._ask(instructor.Mode.JSON_SCHEMA, response_model=None)
        check(answer.choices[0].message.content, answer)

    def stream(self) -> None:
        import instructor

        partial = instructor.Partial[Weather]
        found = list(self._ask(instructor.Mode.TOOLS, response_model=partial, stream=True))
        check(len(found) > 1, found)
        Weather.model_validate(found[-1].model_dump())

    def tools(self) -> None:
        import instructor

        check(isinstance(self._ask(instructor.Mode.TOOLS, response_model=Weather), Weather), "")

    def structured(self) -> None:
        import instructor

        # Its other mode, JSON, holds to any object: whether that fits is up to the model.
        found = self._ask(instructor.Mode.JSON_SCHEMA, response_model=Weather)
        check(isinstance(found, Weather), found)


FRAMEWORKS = (LangChain, LiteLLM, LlamaIndex, Instructor)
PROBES = ("chat", "stream", "tools", "structured")


@contextlib.contextmanager
def server(octavo: str) -> Iterator[str]:
    """Yields the URL of a server that ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        with log.open("wb") as file:
            process = subprocess.Popen([octavo, "serve", MODEL, "--port=0"], stderr=file)
        try:
            while not (found := re.search(r" is served on (http://\S+)", log.read_text())):
                if process.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.1)
            yield f"{found[1]}/v1"
        finally:
            process.terminate()
            process.wait()


def outcome(probe: Callable[[], None]) -> str:
    began = time.perf_counter()
    try:
        probe()
    except Exception:  # whatever a framework raises is a row of the table
        traceback.print_exc()
        return "failed"
    return f"{time.perf_counter() - began:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--octavo", default=".venv/bin/octavo", help="the command that serves")
    parser.add_argument("--url", help="of a server that runs already, with /v1")
    given = parser.parse_args()
    has_failed = False
    with contextlib.nullcontext(given.url) if given.url else server(given.octavo) as url:
        print("| client | version |", " | ".join(PROBES), "|")
        print("| --- | --- |", " --- |" * len(PROBES))
        for framework in FRAMEWORKS:
            found = framework(url)
            outcomes = [outcome(getattr(found, name)) for name in PROBES]
            has_failed |= "failed" in outcomes
            cells = [framework.package, version(framework.package), *outcomes]
            print("|", " | ".join(cells), "|", flush=True)
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
