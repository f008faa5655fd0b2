"""Fleets of real engine processes: their tokens are one engine's, and one's death is not all's."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, AsyncLLM, ConfigError, EngineConfig, SamplingParams
from octavo.engine.fleet import Fleet
from octavo.errors import EngineDeadError, OctavoError
from octavo.outputs import RequestOutput
from octavo.request import Request
from tests.engine.event_sockets import Sockets, replayed
from tests.engine.prompts import greedy, prompts_of, tokens
from tests.models.tiny import save_tiny

OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "device": "cpu",
    "attention_backend": "reference",
    "num_threads": 1,
    "max_model_len": 256,
    "kv_cache_memory_bytes": 2**20,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("mixtral", tmp_path_factory.mktemp("mixtral")).folder)


async def answer(llm: AsyncLLM, prompt: list[int], max_tokens: int) -> RequestOutput:
    output = None
    async for output in llm.generate(prompt, greedy(max_tokens)):  # noqa: B007
        pass
    assert output is not None
    return output


def check_events(endpoint: str, prompts: list[list[int]]) -> None:
    """Each engine tells of its prompts at a place of its own, under its rank."""
    told: set[tuple[int, ...]] = set()
    sockets = Sockets()
    for rank, own in enumerate((endpoint, f"{endpoint}_dp1")):
        messages = replayed(sockets, own, 0)
        assert {message[2] for _, message in messages} == {rank}
        stored = [one for _, message in messages for one in message[1]]
        roots = [one["token_ids"] for one in stored if not one["parent_block_hash"]]
        assert len({tuple(ids[:16]) for ids in roots}) == 2
        told |= {tuple(ids[:16]) for ids in roots}
    sockets.close()
    assert told == {tuple(prompt[:16]) for prompt in prompts}


async def test_a_fleet_keeps_prefixes_together_and_survives_a_death(
    model: str, tmp_path: Path
) -> None:
    places = {"endpoint": f"ipc://{tmp_path}/events", "replay_endpoint": f"ipc://{tmp_path}/kept"}
    events = json.dumps(places)
    config = EngineConfig(model=model, data_parallel_size=2, kv_events_config=events, **OPTIONS)
    async with AsyncLLM(config) as llm:
        fleet = llm._client
        assert isinstance(fleet, Fleet)
        # Four prompts, each asked for again with another end: half of them on each engine.
        prompts = prompts_of((60, 60, 60, 60), seed=4)
        for prompt in prompts:
            assert (await answer(llm, prompt, 4)).num_cached_tokens == 0
            assert (await answer(llm, [*prompt, 7], 4)).num_cached_tokens == 48
        stats = await llm.stats()
        each = [one.num_prompt_tokens for one in stats.engines if one]
        assert each == [242, 242]
        assert stats.num_prompt_tokens == 484
        check_events(places["replay_endpoint"], prompts)
        params = SamplingParams(max_tokens=1)
        told = await llm.explain_prefix(llm.prepare(prompts[1], params))
        assert told.num_cached == 48
        assert await llm.reset_prefix_cache()
        assert (await answer(llm, prompts[0], 4)).num_cached_tokens == 0

        running = [asyncio.create_task(answer(llm, one, 190)) for one in prompts]
        await asyncio.sleep(0.2)
        process = fleet._clients[0]._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        ends = await asyncio.gather(*running, return_exceptions=True)
        # What ran there failed with its reason; what had not begun, and all else, is answered.
        failed = [one for one in ends if isinstance(one, EngineDeadError)]
        assert all("engine 0 of 2" in str(one) and "SIGKILL" in str(one) for one in failed)
        whole = [one for one in ends if isinstance(one, RequestOutput)]
        assert len(failed) + len(whole) == 4
        assert len(whole) >= 1
        await llm.check_health()
        assert (await answer(llm, prompts[2], 4)).finished
        deadline = time.monotonic() + 60
        while len(fleet.link.engines) < 2:
            assert time.monotonic() < deadline, "it is not started again"
            await asyncio.sleep(0.1)
        assert None not in (await llm.stats()).engines


@pytest.mark.slow
def test_llm_over_a_fleet_draws_the_tokens_of_one_engine(model: str) -> None:
    prompts = prompts_of((40, 41, 3, 43, 44, 40), seed=2)
    llm = LLM(model, **OPTIONS)
    expected = tokens(llm.generate(prompts, greedy(20), use_tqdm=False))
    llm.close()
    fleet = LLM(model, data_parallel_size=2, **OPTIONS)
    try:
        assert tokens(fleet.generate(prompts, greedy(20), use_tqdm=False)) == expected
        assert fleet.stats().num_generation_tokens == 20 * len(prompts)
        assert all(one and one.num_generation_tokens for one in fleet.stats().engines)
        assert fleet.reset_prefix_cache()
        assert fleet.plan.num_engines == 2
        with pytest.raises(ConfigError, match="processes of their own"):
            _ = fleet.core
    finally:
        fleet.close()


@pytest.mark.slow
async def test_a_fleet_that_cannot_start_says_why_and_leaves_nobody(model: str) -> None:
    config = EngineConfig(
        model=model, data_parallel_size=2, **{**OPTIONS, "kv_cache_memory_bytes": 2**10}
    )
    llm = AsyncLLM(config)
    with pytest.raises(OctavoError, match="KV cache"):
        await llm.start()
    fleet = llm._client
    assert isinstance(fleet, Fleet)
    assert all(client._process is None for client in fleet._clients.values())
    await llm.close()


def test_sizes_below_one_are_refused(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data_parallel_size must be an integer of at least 1"):
        EngineConfig(model=model, data_parallel_size=0).resolve()


def test_more_engines_than_a_host_runs_are_refused_before_one_is_started(model: str) -> None:
    with pytest.raises(ConfigError, match="data_parallel_size 65 is more than the 64 engines"):
        LLM(model, data_parallel_size=65, **OPTIONS)


def test_a_request_is_found_by_the_same_hashes_that_the_core_uses(model: str) -> None:
    """Equal words of router and cache: else a fleet would never hit."""
    from octavo.engine.prefixes import RequestHasher
    from octavo.kv_cache.hash_memory import hash_of
    from octavo.request import pack_ids

    llm = LLM(model, **OPTIONS)
    (prompt,) = prompts_of((50,), seed=9)
    llm.generate([prompt], greedy(2), use_tqdm=False)
    hasher = RequestHasher(llm.config, llm._front_end.files, llm.plan)
    params = SamplingParams(max_tokens=1)
    asked = Request(request_id="x", packed_prompt=pack_ids(prompt), params=params)
    held = {hash_of(key.digest) for key, _ in llm.core._manager.index.items()}
    assert set(hasher.hashes(asked)) == held
    llm.close()
