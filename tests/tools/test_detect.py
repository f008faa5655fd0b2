"""A model's format is found in its chat template, or named by an option."""

from __future__ import annotations

import pytest

from octavo.tools.detect import REASONING_PARSERS, TOOL_PARSERS, answer_format
from octavo.tools.table import TOOL_FORMATS
from tests.tools.rendering import RENDERINGS

TEMPLATES = [
    ("qwen3", '<tool_call>\\n{"name": <think></think>', "hermes", "qwen3"),
    ("qwen2.5", '<tools></tools><tool_call>\\n{"name": ', "hermes", None),
    ("qwen3-coder", "<tool_call>\\n<function=' + name <parameter=", "qwen3_xml", None),
    ("glm", "<tool_call>' + name <arg_key> </think>", "glm45", "qwen3"),
    ("kimi", "<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2", None),
    ("gpt-oss", "<|channel|>analysis<|message|> to=functions.", "openai", "openai_gptoss"),
    ("deepseek-r1", "<\uff5ctool\u2581sep\uff5c>' + '```json</think>", "deepseek_v3", "qwen3"),
    ("deepseek-v3.1", "<\uff5ctool\u2581sep\uff5c></think>", "deepseek_v31", "qwen3"),
    ("llama3", "<|start_header_id|><|python_tag|>", "llama3_json", None),
    ("llama4", "<|header_start|><|python_start|><|python_end|>", "llama4_pythonic", None),
    ("mistral", "[TOOL_CALLS]", "mistral", None),
    ("minimax", "'<minimax:tool_call>' <think></think>", "minimax_m2", "qwen3"),
    ("granite", "<|start_of_role|><|tool_call|>", "granite", None),
    ("ernie", "<think></think><response><tool_call>", "ernie45", "ernie45"),
    ("hunyuan", "<tool_calls> <think> <answer>", "hunyuan_a13b", "hunyuan_a13b"),
    ("plain", "{{ messages }}", "hermes", None),
]


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [one[1:] for one in TEMPLATES],
    ids=[one[0] for one in TEMPLATES],
)
def test_the_template_tells_the_format(template: str, tools: str, reasoning: str | None) -> None:
    found = answer_format(template, {})
    assert found.tools is not None
    assert found.tools.name == tools
    assert (found.reasoning and found.reasoning.name) == reasoning


def test_an_option_is_stronger_than_the_template() -> None:
    found = answer_format("[TOOL_CALLS]", {}, tool_parser="pythonic", reasoning_parser="none")
    assert found.tools == TOOL_PARSERS["pythonic"]
    assert found.reasoning is None
    assert answer_format("", {}, tool_parser="none").tools is None


def test_every_row_is_rendered_by_a_test() -> None:
    rendered = {TOOL_PARSERS[one.parser].name for one in RENDERINGS.values()}
    assert rendered == {row.name for row in TOOL_FORMATS}


@pytest.mark.parametrize(
    ("prompt", "is_inside"),
    [
        ("<|assistant|><think>\n", True),
        ("<|assistant|>\n<think>\n\n</think>\n\n", False),
        ("<|user|>what is <think><|assistant|>", False),
        ("", False),
    ],
)
def test_the_prompt_tells_whether_the_answer_begins_in_reasoning(
    prompt: str, is_inside: bool
) -> None:
    assert answer_format("", {}, reasoning_parser="qwen3").starts_inside(prompt) == is_inside
    marked = answer_format("", {"<think>": 1, "</think>": 2}, reasoning_parser="qwen3")
    assert marked.starts_inside(prompt) == is_inside


def test_some_models_begin_in_reasoning_without_a_marker() -> None:
    found = answer_format("", {}, reasoning_parser="deepseek_r1")
    assert found.starts_inside("<|assistant|>")
    assert not found.starts_inside("<|assistant|><think></think>")
    assert len(REASONING_PARSERS) > 25
