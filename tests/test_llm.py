"""LLM as vLLM's users call it: a tiny model that can chat, in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import LLM, RequestError, SamplingParams

HELLO = [{"role": "user", "content": "Hi"}]
SHORT = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)


def load(model: str, **options: Any) -> LLM:
    defaults = {"load_format": "dummy", "device": "cpu", "num_threads": 1}
    return LLM(model, **{**defaults, "kv_cache_memory_bytes": "16MiB", **options})


@pytest.fixture
def llm(tiny_chat_model: str) -> Iterator[LLM]:
    loaded = load(tiny_chat_model)
    yield loaded
    loaded.close()


def test_default_parameters_can_be_changed_and_are_copied_when_used(llm: LLM):
    params = llm.get_default_sampling_params()
    params.max_tokens, params.ignore_eos = 3, True
    (output,) = llm.generate("x", params, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 3
    params.top_p = 5.0
    with pytest.raises(RequestError, match="top_p must be"):
        llm.generate("x", params, use_tqdm=False)


def test_arrays_generators_and_neutral_arguments_are_taken(llm: LLM):
    more: dict[str, Any] = {"use_tqdm": False, "lora_request": None, "tokenization_kwargs": None}
    (one,) = llm.generate(np.array([5, 6, 7]), SHORT, **more)
    assert one.prompt_token_ids == [5, 6, 7]
    two = llm.generate((text for text in ("a", "b")), SHORT, **more)
    assert [output.prompt for output in two] == ["a", "b"]
    with pytest.raises(RequestError, match="lora_request is not supported: LoRA"):
        llm.generate("x", SHORT, lora_request="adapter")
    with pytest.raises(RequestError, match=r"LLM.generate has no argument 'lora'"):
        llm.generate("x", SHORT, lora=None)
    wrong: Any = {"temperature": 0}
    with pytest.raises(RequestError, match="sampling_params must be SamplingParams, got dict"):
        llm.generate("x", wrong)


def test_a_prompt_with_a_salt_shares_no_prefix(llm: LLM):
    ids = list(range(10, 60))
    salted: Any = {"prompt_token_ids": ids, "cache_salt": "mine"}
    llm.generate(ids, SHORT, use_tqdm=False)
    assert llm.generate(salted, SHORT, use_tqdm=False)[0].num_cached_tokens == 0
    assert llm.generate(ids, SHORT, use_tqdm=False)[0].num_cached_tokens == 48


def test_chat_reads_messages_as_the_server_does(llm: LLM):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    first, second = llm.chat([HELLO, parts], SHORT, use_tqdm=False)
    assert first.prompt_token_ids == second.prompt_token_ids
    assert llm.get_tokenizer().decode(first.prompt_token_ids) == "user:Hi;"
    for messages, param in (
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        (
            [HELLO, [{"role": "user", "content": [{"type": "image_url"}]}]],
            "messages[1][0].content[0]",
        ),
        ("Hi", "messages"),
        ([], "messages"),
        ([HELLO, "Hi"], "messages[1]"),
    ):
        wrong: Any = messages
        with pytest.raises(RequestError) as refused:
            llm.chat(wrong, SHORT)
        assert refused.value.param == param


def test_chat_has_vllms_arguments(llm: LLM):
    template = "{{ messages[-1].content }}|{{ mood }}|{% if add_generation_prompt %}go{% endif %}"
    more: dict[str, Any] = {"chat_template": template, "chat_template_kwargs": {"mood": "glad"}}
    neutral: dict[str, Any] = {"tools": None, "lora_request": None, "mm_processor_kwargs": None}
    (output,) = llm.chat(HELLO, SHORT, False, **more, **neutral)
    decode = llm.get_tokenizer().decode
    assert decode(output.prompt_token_ids) == "Hi|glad|go"
    (output,) = llm.chat(
        HELLO, SHORT, False, add_generation_prompt=False, continue_final_message=True, **more
    )
    assert decode(output.prompt_token_ids) == "Hi"
    with pytest.raises(RequestError, match="function must be an object with a name"):
        llm.chat(HELLO, SHORT, tools=[{"type": "function"}])


def test_the_models_sampling_is_left_out_where_vllms_defaults_are_asked_for(tiny_chat_model: str):
    (Path(tiny_chat_model) / "generation_config.json").write_text(json.dumps({"top_k": 7}))
    for generation_config, top_k in (("auto", 7), ("vllm", 0)):
        llm = load(tiny_chat_model, generation_config=generation_config)
        assert llm.get_default_sampling_params().top_k == top_k
        llm.close()
