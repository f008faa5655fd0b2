"""AsyncLLM with its engine process: streams, aborts, overload, and both kinds of death."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo import AsyncLLM, SamplingParams
from octavo.errors import (
    ConfigError,
    EngineDeadError,
    ModelError,
    OverloadedError,
    PreemptedError,
    RequestError,
)
from octavo.outputs import RequestOutput
from tests.engine.configs import PROMPT, config
from tests.models.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("mixtral", tmp_path_factory.mktemp("mixtral")).folder)


@pytest.fixture
async def engine(model: str) -> AsyncIterator[AsyncLLM]:
    llm = AsyncLLM(config(model))
    await llm.start()
    yield llm
    await llm.close()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


async def collect(llm: AsyncLLM, request_id: str, max_tokens: int) -> list[RequestOutput]:
    stream = llm.generate(PROMPT, greedy(max_tokens), request_id=request_id)
    return [output async for output in stream]


async def test_outputs_stream_and_equal_prompts_give_equal_tokens(engine: AsyncLLM) -> None:
    results = await asyncio.gather(*(collect(engine, f"r{i}", 12) for i in range(8)))
    tokens = [outputs[-1].outputs[0].token_ids for outputs in results]
    assert all(ids == tokens[0] for ids in tokens)
    assert len(tokens[0]) == 12
    for outputs in results:
        assert len(outputs) > 1, "tokens came all at once"
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        added = [ids for output in outputs for delta in output.deltas for ids in delta.token_ids]
        assert added == tokens[0]


async def test_leaving_a_stream_frees_its_blocks(engine: AsyncLLM) -> None:
    stream = engine.generate(PROMPT, greedy(200), request_id="left")
    await anext(stream)
    assert (await engine.stats()).num_running == 1
    await stream.aclose()
    stats = await engine.stats()
    assert (stats.num_running, stats.num_used_blocks) == (0, 0)
    assert await engine.reset_prefix_cache()


async def test_an_aborted_request_ends_with_that_reason(engine: AsyncLLM) -> None:
    stream = engine.generate(PROMPT, greedy(200), request_id="a")
    await anext(stream)
    await engine.abort("a")
    last = [output async for output in stream][-1]
    assert last.outputs[0].finish_reason == "abort"


async def test_bad_requests_are_refused_alone(engine: AsyncLLM) -> None:
    running = asyncio.create_task(collect(engine, "good", 30))
    with pytest.raises(RequestError, match="empty"):
        await anext(engine.generate([], greedy(1), request_id="bad"))
    assert len((await running)[-1].outputs[0].token_ids) == 30


async def test_a_request_id_in_use_is_refused(engine: AsyncLLM) -> None:
    stream = engine.generate(PROMPT, greedy(50), request_id="same")
    await anext(stream)
    with pytest.raises(RequestError, match="in use"):
        await anext(engine.generate(PROMPT, greedy(1), request_id="same"))
    await stream.aclose()


async def test_an_id_that_was_left_early_can_be_used_again_at_once(engine: AsyncLLM) -> None:
    right = (await collect(engine, "reference", 12))[-1].outputs[0].token_ids
    for i in range(10):
        stream = engine.generate([5] * 40, greedy(12), request_id="same")
        for _ in range(1 + i % 3):
            await anext(stream, None)
        await stream.aclose()
        again = (await collect(engine, "same", 12))[-1].outputs[0]
        assert (again.token_ids, again.finish_reason) == (right, "length")


async def test_late_aborts_and_cancels_are_harmless(engine: AsyncLLM) -> None:
    await collect(engine, "a", 3)
    await engine.abort("a")
    await engine.abort("never there")
    request = engine.prepare(PROMPT, greedy(3))
    engine.cancel(request.request_id)
    assert len((await collect(engine, "a", 3))[-1].outputs[0].token_ids) == 3


async def test_a_full_queue_says_so(model: str) -> None:
    llm = AsyncLLM(config(model, max_num_seqs=1, max_num_queued_requests=1))
    await llm.start()
    try:
        results = await asyncio.gather(
            *(collect(llm, f"r{i}", 50) for i in range(6)), return_exceptions=True
        )
        refused = [result for result in results if isinstance(result, OverloadedError)]
        assert refused
        assert all(isinstance(r, (list, OverloadedError)) for r in results)
    finally:
        await llm.close()


async def test_a_killed_engine_answers_every_open_request_with_an_error(model: str) -> None:
    llm = AsyncLLM(config(model))
    await llm.start()
    await llm.check_health()
    streams = [llm.generate(PROMPT, greedy(200), request_id=f"r{i}") for i in range(3)]
    for stream in streams:
        await anext(stream)
    process = llm._client._process
    assert process is not None
    process.kill()
    for stream in streams:
        with pytest.raises(EngineDeadError):
            async for _ in stream:
                pass
    assert not llm.is_ready
    with pytest.raises(EngineDeadError):
        await llm.check_health()
    await llm.close()


async def test_a_model_that_cannot_load_raises_its_own_error(model: str, tmp_path: Path) -> None:
    for file in Path(model).iterdir():
        data = file.read_bytes()
        cut = data[: len(data) // 2] if file.suffix == ".safetensors" else data
        (tmp_path / file.name).write_bytes(cut)
    llm = AsyncLLM(config(str(tmp_path)))
    with pytest.raises(ModelError, match="safetensors"):
        await llm.start()
    await llm.close()


async def test_it_has_the_form_of_llm(model: str) -> None:
    options = {"device": "cpu", "skip_tokenizer_init": True, "num_threads": 1, "swap_space": 0}
    async with AsyncLLM(model, kv_cache_memory_bytes="4MiB", **options) as llm:
        params = greedy(3)
        streams = [llm.generate(np.array(PROMPT), sampling_params=params) for _ in range(2)]
        first = [await anext(stream) for stream in streams]
        params.max_tokens = 50  # changes nothing of what runs
        assert first[0].request_id != first[1].request_id
        last = [output async for output in streams[0]][-1]
        assert len(last.outputs[0].token_ids) == 3
        assert last.prompt_token_ids == PROMPT
        params.top_p = 7.0
        with pytest.raises(RequestError, match="top_p must be"):
            await anext(llm.generate(PROMPT, params, "bad"))
        wrong: Any = {"max_tokens": 3}
        with pytest.raises(RequestError, match="sampling_params must be SamplingParams, got dict"):
            await anext(llm.generate(PROMPT, wrong))
        with pytest.raises(RequestError, match=r"AsyncLLM.generate has no argument 'params'"):
            await anext(llm.generate(PROMPT, params=greedy(1)))
        neutral: dict[str, Any] = {"lora_request": None, "trace_headers": None}
        assert (await anext(llm.generate(PROMPT, greedy(1), **neutral))).finished
        assert llm.get_default_sampling_params() == SamplingParams()
        with pytest.raises(RequestError, match="skip_tokenizer_init"):
            llm.get_tokenizer()


def test_options_are_refused_as_those_of_llm_are(model: str) -> None:
    with pytest.raises(ConfigError, match="did you mean max_model_len"):
        AsyncLLM(model, max_modl_len=5)
    with pytest.raises(ConfigError, match="max_model_len: give options either in EngineConfig or"):
        AsyncLLM(config(model), max_model_len=5)


async def test_what_has_not_begun_is_handed_back_and_what_has_goes_on(engine: AsyncLLM) -> None:
    running = engine.generate(PROMPT, greedy(30))
    await anext(running)
    waiting = [asyncio.create_task(collect(engine, f"w{i}", 30)) for i in range(3)]
    while engine._output is None or engine._output.num_requests < 4:
        await asyncio.sleep(0)
    assert engine.hand_back() == 3
    for one in waiting:
        with pytest.raises(PreemptedError, match="send it again"):
            await one
    outputs = [output async for output in running]
    assert len(outputs[-1].outputs[0].token_ids) == 30
    assert (await collect(engine, "w0", 4))[-1].finished
