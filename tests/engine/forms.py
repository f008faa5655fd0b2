"""Forms that outputs are held to, and an engine of a tiny chat model."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema_rs
from hypothesis import strategies as st

from octavo import LLM, CompletionOutput, SamplingParams, StructuredOutputsParams
from octavo.grammar import Matcher, grammar_text
from octavo.grammar.compiler import Compiler

EOS = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"enum": ["s", "m", "l"]},
        "counts": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}
FORMS: tuple[dict[str, Any], ...] = (
    {"json": SCHEMA},
    {"regex": "[a-d]{2,9}x|-+>"},
    {"choice": ["yes", "no", "yes please"]},
    {"grammar": 'root ::= "(" root ")" | [0-9] | root "+" root'},
    {"json_object": True},
)


def make_llm(folder: str, **options: Any) -> LLM:
    defaults = {
        "load_format": "dummy",
        "dtype": "float32",
        "num_threads": 1,
        "max_num_seqs": 8,
        "max_model_len": 256,
        "poison_freed_blocks": True,
        "kv_cache_memory_bytes": 4 * 2**20,
    }
    return LLM(folder, **{**defaults, **options})


def matcher_of(compiler: Compiler, form: dict[str, Any]) -> Matcher:
    return compiler.compile(grammar_text(StructuredOutputsParams(**form)))


def params_of(form: dict[str, Any] | None, **more: Any) -> SamplingParams:
    wanted = None if form is None else StructuredOutputsParams(**form)
    return SamplingParams(**{"max_tokens": 60, "structured_outputs": wanted, **more})


def generate(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[Any]:
    return llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]


def check(compiler: Compiler, form: dict[str, Any], output: CompletionOutput) -> None:
    """Raises AssertionError unless an output that ended is whole, and one cut off can go on."""
    ids = [token_id for token_id in output.token_ids if token_id != EOS]
    matcher = matcher_of(compiler, form)
    assert matcher.accepts(ids) == len(ids), output.text
    assert output.finish_reason in ("stop", "length")
    if output.finish_reason == "length":
        return
    matcher.advance(ids)
    assert matcher.can_end, output.text
    if "json" in form:
        assert jsonschema_rs.validator_for(form["json"]).is_valid(json.loads(output.text))
    if "json_object" in form:
        assert isinstance(json.loads(output.text), dict)
    if "regex" in form:
        assert re.fullmatch(form["regex"], output.text)
    if "choice" in form:
        assert output.text in form["choice"]


SAMPLING = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 5.0]),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 1000),
        "top_k": st.sampled_from([0, 1, 5]),
        "top_p": st.sampled_from([0.3, 1.0]),
        "min_tokens": st.sampled_from([0, 4, 30]),
        "max_tokens": st.sampled_from([30, 60]),
        "logprobs": st.sampled_from([None, 2]),
        "presence_penalty": st.sampled_from([0.0, 1.5]),
        "ignore_eos": st.booleans(),
        "logit_bias": st.sampled_from([None, {40: 100.0, 41: -100.0}]),
        "allowed_token_ids": st.sampled_from([None, (3, 4, 5), tuple(range(60, 128))]),
        "bad_words": st.sampled_from([(), ("yes", "a")]),
    }
)
