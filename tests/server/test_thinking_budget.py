"""A reasoning that is bounded: over a socket, from a real model of random weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from octavo.constraint import StructuredOutputsParams
from octavo.errors import RequestError
from octavo.llm import LLM
from octavo.request import SamplingParams
from tests.server.conftest import ServerThread
from tests.server.tiny_engine import TEMPLATE, write_model

BUDGET = 5
THINKS = TEMPLATE.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 60, "seed": 3}


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Returns what an engine of a model that thinks is made of."""
    folder = write_model(tmp_path_factory.mktemp("thinker"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    known = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for place, text in enumerate(("<think>", "</think>")):
        token = {"id": 318 + place, "content": text, "special": False, **known}
        tokenizer["added_tokens"].append(token)
    vocabulary = tokenizer["model"]["vocab"]
    last = {text for text, place in vocabulary.items() if place >= 318}
    for text in last:
        del vocabulary[text]
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [one for one in merges if "".join(one) not in last]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": THINKS}))
    return {
        "model": str(folder),
        "load_format": "dummy",
        "dtype": "float32",
        "device": "cpu",
        "kv_cache_memory_bytes": 2**24,
        "reasoning_parser": "deepseek_r1",
        "num_threads": 1,
    }


@pytest.fixture(scope="module")
def url(options: dict[str, Any]) -> Iterator[str]:
    server = ServerThread(AsyncLLM(EngineConfig(**options)), ServerConfig(port=0))
    yield server.url
    server.end()


def ask(url: str, **more: Any) -> dict[str, Any]:
    answer = httpx.post(f"{url}/v1/chat/completions", json={**CHAT, **more}, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_follows_after_so_many_tokens(url: str) -> None:
    for seed in range(3):
        once = {"318": -100.0}  # it does not begin again
        found = ask(url, thinking_token_budget=BUDGET, seed=seed, logit_bias=once)
        reasoned = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert reasoned <= BUDGET + 1, "the token that ends it belongs to it"
        assert found["choices"][0]["message"]["content"]


def test_a_form_begins_behind_it(url: str) -> None:
    form = {"structured_outputs": {"choice": ["yes", "no"]}}
    cut = ask(url, **form, logit_bias={"319": -100})["choices"][0]
    assert cut["finish_reason"] == "length"
    assert not cut["message"]["content"], "what is not held is never content"
    for budget in (0, BUDGET):
        found = ask(url, thinking_token_budget=budget, **form, logit_bias={"319": -100})
        choice = found["choices"][0]
        assert choice["message"]["content"] in ("yes", "no")
        assert choice["finish_reason"] == "stop"
        reasoned = found["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert reasoned == budget + 1


def test_what_may_not_come_at_all_still_ends_it(url: str) -> None:
    allowed = {"allowed_token_ids": [70, 71]}
    assert ask(url, thinking_token_budget=BUDGET, **allowed)["choices"][0]["message"]["content"]


def test_in_python_too(options: dict[str, Any]) -> None:
    llm = LLM(**options)
    choice = StructuredOutputsParams(choice=["yes", "no"])
    params = SamplingParams(
        max_tokens=60, seed=3, structured_outputs=choice, logit_bias={319: -100.0}
    )
    (cut,) = llm.chat(CHAT["messages"], params, use_tqdm=False)
    assert not cut.outputs[0].message["content"]
    (found,) = llm.chat(CHAT["messages"], params, use_tqdm=False, thinking_token_budget=BUDGET)
    assert found.outputs[0].message["content"] in ("yes", "no")
    with pytest.raises(RequestError, match="thinking_token_budget -1"):
        llm.chat(CHAT["messages"], params, use_tqdm=False, thinking_token_budget=-1)
    llm.close()
