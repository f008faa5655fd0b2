"""Answers held to a form over HTTP, in every spelling; what cannot be held is a 400."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import openai
import pytest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
REAL = pytest.mark.parametrize("base_url", ["real"], indirect=True)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}
TAG = {
    "structures": [{"begin": "<n>", "schema": {"enum": [1, 2]}, "end": "</n>"}],
    "triggers": ["<n"],
}
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        "json",
    ),
    "json_object": ({"response_format": {"type": "json_object"}}, "object"),
    "structured_json": ({"structured_outputs": {"json": SCHEMA}}, "json"),
    "structured_text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json"),
    "guided_json": ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, "json"),
    "regex": ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
    "guided_regex": ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
    "choice": ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
    "guided_choice": ({"guided_choice": ["yes", "no"]}, "yes|no"),
    "grammar": ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]'}}, "a[0-9]"),
    "guided_grammar": ({"guided_grammar": 'start: "a" /[0-9]/'}, "a[0-9]"),
    "tag": (
        {
            "response_format": {
                "type": "structural_tag",
                "format": {"type": "const_string", "value": "<done>"},
            }
        },
        "<done>",
    ),
}


def check(text: str, form: str) -> None:
    if form == "object":
        assert isinstance(json.loads(text), dict)
    elif form == "json":
        value = json.loads(text)
        assert list(value) == ["name", "kind", "age"]
        assert value["kind"] in ("cat", "dog")
        assert 0 <= value["age"] <= 99
    else:
        assert re.fullmatch(form, text)


@REAL
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_an_answer_has_the_form(http: httpx.Client, path: str, form: str) -> None:
    fields, wanted = FORMS[form]
    prompt = {"messages": [{"role": "user", "content": "Go"}]} if path == CHAT else {"prompt": "Go"}
    body = {**prompt, "n": 3, "seed": 5, "max_tokens": 200, "temperature": 1.0, **fields}
    answer = http.post(path, json=body, timeout=60).json()
    num_whole = 0
    for choice in answer["choices"]:
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        assert choice["stop_reason"] is None
        if choice["finish_reason"] == "stop":
            check(text, wanted)
            num_whole += 1
    assert num_whole or form == "json_object"


@REAL
def test_a_stream_brings_the_same_form(client: openai.OpenAI, model: str) -> None:
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Go"}],
        response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA}},
        max_tokens=200,
        temperature=1.0,
        stream=True,
    )
    chunks = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert chunks[-1].finish_reason == "stop"
    check("".join(chunk.delta.content or "" for chunk in chunks), "json")


@REAL
def test_text_asks_for_nothing(http: httpx.Client) -> None:
    bodies = [
        {"response_format": {"type": "text"}},
        {"structured_outputs": {}},
        {"structured_outputs": {"json_object": False}, "response_format": None},
        {},
    ]
    texts = []
    for fields in bodies:
        body = {"prompt": "Go", "max_tokens": 8, "temperature": 0, **fields}
        texts.append(http.post(TEXT, json=body).json()["choices"][0]["text"])
    assert len(set(texts)) == 1


OPTIONS = "start: one*\none: " + " | ".join(f'"a" "{n}"' for n in range(3000))
NOTHING = {"type": "grammar", "grammar": "start: start"}
EMPTY = {"format": {"type": "tag", "begin": "<a>", "end": "</a>", "content": NOTHING}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
        "response_format",
        "Invalid type",
    ),
    (
        {"response_format": {"type": "json_schema"}},
        "response_format",
        "json_schema, got none",
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "schema"),
    ({"response_format": {"type": "text", "triggers": []}}, "response_format", "no other field"),
    ({"response_format": {"kind": "json"}}, "response_format.kind", "unknown field"),
    ({"response_format": {"type": "structural_tag", **TAG, "format": {}}}, "response_format", ""),
    ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs", "look-around"),
    ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs", "choice"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs", "exactly one"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "no JSON"),
    ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", "no finite"),
    ({"structured_outputs": {"yaml": "x"}}, "structured_outputs.yaml", "unknown field"),
    ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn", "structured_outputs.json?"),
    ({"guided_json": {"type": "x"}}, "guided_json", "Invalid type"),
    ({"guided_choice": []}, "guided_choice", "choice"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex", "both"),
    ({"guided_json": {"properties": {f"p{i}": {} for i in range(401)}}}, "guided_json", "401 prop"),
    ({"structured_outputs": {"grammar": OPTIONS}}, "structured_outputs", "items"),
    ({"structured_outputs": {"structural_tag": EMPTY}}, "structured_outputs", "no text fits"),
    ({"guided_grammar": "x" * 300_000}, "guided_grammar", "at most"),
    ({"guided_json": {"enum": ["x" * 400] * 700}}, "guided_json", "at most"),
]


@pytest.mark.parametrize("place", range(len(REFUSED)))
def test_what_cannot_be_had_is_a_400_with_the_reason(http: httpx.Client, place: int) -> None:
    fields, param, reason = REFUSED[place]
    answer = http.post(TEXT, json={"prompt": "Go", **fields}, timeout=60)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(param), error
    assert reason in error["message"], error
    assert http.post(TEXT, json={"prompt": "Go", "max_tokens": 2}).status_code == 200


@REAL
def test_a_form_that_explodes_as_the_answer_is_written_is_the_clients(
    http: httpx.Client,
) -> None:
    body = {"prompt": "Go", "max_tokens": 200, "min_tokens": 150, "temperature": 0}
    body["guided_regex"] = "((a{1,1000}){1,1000}){1,1000}"
    for _ in range(2):
        answer = http.post(TEXT, json=body)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["code"] == "form_too_large"
        assert "any further: lexer error" in error["message"], error
    lines = []
    with http.stream("POST", TEXT, json={**body, "stream": True}) as stream:
        for line in stream.iter_lines():
            lines.append(line)
            if "error" in line:
                break
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "form_too_large"


def test_a_form_that_explodes_harms_nobody(http: httpx.Client) -> None:
    patterns = ["(.*a.{200}){20}", "(a?){60}" * 40, "(.*a){60}", "((a|b)*c){200}x{500}", "(x+x+)+y"]
    for pattern in patterns:
        body = {"prompt": "Go", "max_tokens": 8, "structured_outputs": {"regex": pattern}}
        answer = http.post(TEXT, json=body, timeout=60)
        assert answer.status_code in (200, 400), answer.text
    assert http.post(TEXT, json={"prompt": "Go", "max_tokens": 2}).status_code == 200
