"""Outputs held to a form, by a model with random weights: it wants everything but that form."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo import LLM, RequestError, SamplingParams, StructuredOutputsParams
from octavo.constraint import FORM_TOO_LARGE, Constraint
from octavo.engine.core import EngineCore
from octavo.grammar import Matcher, grammar_text
from octavo.grammar.compiler import Compiler
from octavo.request import FinishReason, Request, pack_ids
from tests.engine.forms import EOS, FORMS, SAMPLING, check, generate, make_llm, params_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.conftest import save_tiny_chat_model

    return save_tiny_chat_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    made = make_llm(folder)
    yield made
    made.close()


@pytest.fixture
def compiler(llm: LLM) -> Compiler:
    return Compiler(llm.tokenizer.vocabulary, llm.vocab_size)


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_constraint_is_never_dropped(llm: LLM, compiler: Compiler, data: st.DataObject) -> None:
    forms = data.draw(st.lists(st.sampled_from([*FORMS, None]), min_size=1, max_size=5))
    sampling = [data.draw(SAMPLING) for _ in forms]
    length = data.draw(st.integers(1, 60))
    chance = random.Random(data.draw(st.integers(0, 99)))
    prompts = [[chance.randrange(2, 258) for _ in range(length)] for _ in forms]
    params = [params_of(form, **more) for form, more in zip(forms, sampling, strict=True)]
    found = generate(llm, prompts, params)
    for form, result, more in zip(forms, found, sampling, strict=True):
        assert len(result.outputs) == more["n"]
        for output in result.outputs:
            assert more["logprobs"] is None or len(output.logprobs) == len(output.token_ids)
            if form is not None:
                check(compiler, form, output)
    llm.core.check()


def test_neighbours_without_a_form_get_the_tokens_that_they_get_alone(llm: LLM) -> None:
    prompts = [[5 + i, 6, 7, 8] for i in range(4)]
    free = params_of(None, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    alone = [generate(llm, [prompt], [free])[0].outputs[0].token_ids for prompt in prompts[:2]]
    bound = params_of(FORMS[0], temperature=1.0, seed=3)
    mixed = generate(llm, prompts, [free, free, bound, bound])
    assert [one.outputs[0].token_ids for one in mixed[:2]] == alone


def test_nothing_around_a_sequence_changes_its_tokens(llm: LLM, folder: str) -> None:
    """Alone and together, with a warm prefix, and where blocks are taken away and computed anew."""
    forms = (FORMS[0], {"regex": "[a-d]{45,55}x"})
    prompts = [[9 + i % 3] * 40 + [20 + i] for i in range(6)]
    params = [params_of(forms[i % 2], temperature=1.0, seed=i, n=2) for i in range(6)]

    def tokens(found: list[Any]) -> list[list[list[int]]]:
        return [[list(one.token_ids) for one in result.outputs] for result in found]

    together = tokens(generate(llm, prompts, params))
    alone = [
        tokens(generate(llm, [prompt], [one]))[0]
        for prompt, one in zip(prompts, params, strict=True)
    ]
    assert alone == together
    page = llm.plan.block_bytes
    small = make_llm(folder, kv_cache_memory_bytes=20 * page, max_model_len=128, max_num_seqs=16)
    try:
        assert tokens(generate(small, prompts, params)) == together
        assert small.stats().num_preemptions > 0
    finally:
        small.close()


def test_a_whole_text_ends_at_once_without_an_end_token(llm: LLM) -> None:
    found = generate(llm, [[5, 6]], [params_of({"choice": ["yes"]}, ignore_eos=True)])
    [output] = found[0].outputs
    assert (output.text, output.finish_reason, output.stop_reason) == ("yes", "stop", None)
    assert len(output.token_ids) == 3


def test_what_reads_as_a_special_token_is_text(llm: LLM) -> None:
    """A text that is forced is spelt by the tokenizer, to which it is that token."""
    for special, token_id in llm.tokenizer.special_strings.items():
        for text in (special, f"a{special}b"):
            found = generate(llm, [[5, 6]], [params_of({"choice": [text]}, max_tokens=90)])
            [output] = found[0].outputs
            assert (output.text, output.finish_reason) == (text, "stop")
            assert token_id not in output.token_ids[:-1]


def test_a_stop_string_cuts_and_says_so(llm: LLM) -> None:
    params = params_of({"choice": ["yes please"]}, stop=["s p"])
    [output] = generate(llm, [[5, 6]], [params])[0].outputs
    assert (output.text, output.finish_reason, output.stop_reason) == ("ye", "stop", "s p")


def test_a_stop_token_may_come_where_a_text_may_end(llm: LLM) -> None:
    [stop] = llm.tokenizer.encode("a")
    params = params_of({"regex": "b{3}a*"}, stop_token_ids=[stop], max_tokens=9)
    [output] = generate(llm, [[5, 6]], [params])[0].outputs
    assert output.text == "bbb"
    assert output.finish_reason == "stop"


def test_a_form_that_explodes_late_says_so_and_harms_nobody(llm: LLM) -> None:
    form = {"regex": "((a{1,1000}){1,1000}){1,1000}"}
    exploding = params_of(form, min_tokens=150, max_tokens=200)
    free = params_of(None, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    alone = generate(llm, [[5, 6]], [free])[0].outputs[0].token_ids
    for _ in range(2):
        bound, beside = generate(llm, [[5, 6], [5, 6]], [exploding, free])
        assert bound.outputs[0].finish_reason == "error"
        assert bound.outputs[0].stop_reason.startswith(FORM_TOO_LARGE)
        assert beside.outputs[0].token_ids == alone
    # What one output has used up is not missing to the next of the same form.
    short = params_of(form, min_tokens=2, max_tokens=2)
    [output] = generate(llm, [[5, 6]], [short])[0].outputs
    assert (output.finish_reason, set(output.text)) == ("length", {"a"})


def test_the_same_form_twice_is_compiled_once(llm: LLM) -> None:
    form = {"regex": "[qz]{4}"}
    generate(llm, [[5]], [params_of(form)])
    began = time.perf_counter()
    generate(llm, [[5]] * 4, [params_of(form)] * 4)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"json": {"type": "nothing"}}, "Invalid type"),
        ({"regex": "a(?=b)"}, "look-around"),
        ({"grammar": 'start: start "a"'}, "no text fits it"),
    ],
    ids=["json", "regex", "grammar"],
)
def test_what_cannot_be_had_is_refused_before_anything_runs(
    llm: LLM, form: dict[str, Any], reason: str
) -> None:
    num_steps = llm.stats().num_steps
    with pytest.raises(RequestError, match=reason):
        generate(llm, [[5], [6]], [params_of(None), params_of(form)])
    assert llm.stats().num_steps == num_steps


def test_without_a_tokenizer_there_is_no_form(folder: str) -> None:
    bare = make_llm(folder, skip_tokenizer_init=True)
    try:
        with pytest.raises(RequestError, match="needs a tokenizer"):
            generate(bare, [[5]], [params_of(FORMS[0], detokenize=False)])
    finally:
        bare.close()


def run_core(core: EngineCore, *requests: Request) -> dict[str, tuple[list[int], FinishReason]]:
    """Returns the tokens and the end of each request's only sequence."""
    for request in requests:
        core.add(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    ends: dict[str, FinishReason] = {}
    while core.has_work:
        for delta in core.step():
            tokens[delta.request_id].extend(delta.token_ids)
            if delta.finish_reason is not None:
                ends[delta.request_id] = delta.finish_reason
    return {one: (tokens[one], ends[one]) for one in tokens}


def reasoning_request(name: str, end: int, max_tokens: int, seed: int) -> Request:
    wanted = StructuredOutputsParams(choice=["yes", "no"])
    return Request(
        request_id=name,
        packed_prompt=pack_ids([5, 6, 7]),
        params=SamplingParams(
            temperature=1.0, seed=seed, max_tokens=max_tokens, logit_bias={end: 3.0 * (seed % 2)}
        ),
        constraint=Constraint(
            grammar=grammar_text(wanted), thought_ends=(end,), starts_inside=True
        ),
        eos_token_ids=(EOS,),
    )


def test_after_reasoning_the_form_begins(llm: LLM) -> None:
    core = llm.core
    found = run_core(core, *(reasoning_request(f"r{i}", 40 + i, 100, i) for i in range(6)))
    num_ended = 0
    for place in range(6):
        tokens, end = found[f"r{place}"]
        if 40 + place not in tokens:
            # Thinking has used up all there was: nothing follows, and nothing unbound is given.
            assert end == FinishReason.LENGTH
            continue
        content = tokens[tokens.index(40 + place) + 1 :]
        text = llm.tokenizer.decode([one for one in content if one != EOS])
        num_ended += end == FinishReason.STOP
        assert text in ("yes", "no") if end == FinishReason.STOP else "yes".startswith(text)
        assert EOS not in tokens[: tokens.index(40 + place)]
    assert num_ended


def test_others_go_on_while_a_grammar_is_compiled(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = llm.core
    compile_now = Compiler.compile

    def compile_late(self: Compiler, grammar: str) -> Matcher:
        time.sleep(0.3)
        return compile_now(self, grammar)

    monkeypatch.setattr(Compiler, "compile", compile_late)
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    core.add(
        Request(
            request_id="bound",
            packed_prompt=pack_ids([5]),
            params=SamplingParams(max_tokens=8),
            constraint=Constraint(grammar=grammar_text(StructuredOutputsParams(regex="[jk]{3}"))),
            eos_token_ids=(EOS,),
        )
    )
    core.add(Request(request_id="free", packed_prompt=pack_ids([6]), params=free))
    order: list[str] = []
    tokens: list[int] = []
    while core.has_work:
        for delta in core.step():
            if delta.finish_reason is not None:
                order.append(delta.request_id)
            if delta.request_id == "bound":
                tokens.extend(delta.token_ids)
    assert order == ["free", "bound"]
    assert re.fullmatch("[jk]{3}", llm.tokenizer.decode(tokens))


def test_a_request_that_waits_for_its_grammar_can_be_aborted(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = llm.core
    compile_now = Compiler.compile

    def compile_late(self: Compiler, grammar: str) -> Matcher:
        time.sleep(0.1)
        return compile_now(self, grammar)

    monkeypatch.setattr(Compiler, "compile", compile_late)
    request = Request(
        request_id="bound",
        packed_prompt=pack_ids([5]),
        params=SamplingParams(max_tokens=8),
        constraint=Constraint(grammar=grammar_text(StructuredOutputsParams(regex="[uv]{3}"))),
    )
    core.add(request)
    core.step()
    core.abort("bound")
    while core.has_work:
        core.step()
    core.check()


def test_a_step_that_raises_leaves_grammars_where_they_stood(
    llm: LLM, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = llm.core._runner._forward  # type: ignore[attr-defined]
    run, failures = type(host).run, [5, 9]
    calls = 0

    def failing(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in failures:
            raise RuntimeError("a step that raises")
        return run(self, *args)

    params = [params_of(FORMS[i % 3], temperature=1.0, seed=i) for i in range(4)]
    prompts = [[5 + i] * 3 for i in range(4)]
    whole = generate(llm, prompts, params)
    monkeypatch.setattr(type(host), "run", failing)
    found = generate(llm, prompts, params)
    assert calls > 9
    for place, result in enumerate(found):
        check(compiler, FORMS[place % 3], result.outputs[0])
        assert result.outputs[0].token_ids == whole[place].outputs[0].token_ids


def test_a_device_draws_what_the_form_allows(folder: str) -> None:
    """Through the interpreter where there is no GPU."""
    pytest.importorskip("tests.kernels.triton.interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm = make_llm(
        folder, attention_backend="triton", device=device, max_num_seqs=4, max_model_len=64
    )
    forms: list[dict[str, Any] | None] = [{"choice": ["yes", "no"]}, {"regex": "[ab]{2}"}, None]
    [banned] = llm.tokenizer.encode("a")
    params = [
        params_of(forms[0], temperature=1.0, seed=1, logprobs=1),
        params_of(forms[1], temperature=0.0, bad_words=["aa", "ba"], logit_bias={banned: 100.0}),
        params_of(None, temperature=0.0, max_tokens=3, ignore_eos=True, logit_bias={9: 100.0}),
    ]
    try:
        found = [one.outputs[0] for one in generate(llm, [[5, 6], [7, 8, 9], [10]], params)]
    finally:
        llm.close()
    assert found[0].text in ("yes", "no")
    assert len(found[0].logprobs) == len(found[0].token_ids)
    assert found[1].text == "ab"  # a is wanted, and may not follow
    assert found[2].token_ids == [9, 9, 9]
