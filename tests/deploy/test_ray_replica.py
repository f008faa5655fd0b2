"""An engine as a replica, under an AsyncLLM as an ingress has it: all but Ray itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from octavo import AsyncLLM, EngineConfig, EngineDeadError, SamplingParams
from octavo.deploy.ray.fleet import RayFleet
from octavo.deploy.ray.replica import KV_USE, EngineReplica
from octavo.engine.ipc import Deltas, decode_from_engine, encode
from tests.server.tiny_engine import write_model

PROMPT = "Once upon a time there was a hello world and then another one. " * 3
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


class Direct:
    """As `fleet.Handle`, over replicas of this process."""

    def __init__(self, *replicas: EngineReplica) -> None:
        self._replicas = {f"replica-{place}": one for place, one in enumerate(replicas)}

    async def look(self, numbers: dict[str, int]) -> list[bytes | BaseException]:
        looks = (one.look(numbers) for one in self._replicas.values())
        return await asyncio.gather(*looks, return_exceptions=True)

    def generate(self, name: str, data: bytes) -> Any:
        return self._replicas[name].generate(name, data)

    async def call(self, method: str, name: str, *arguments: Any) -> Any:
        return await getattr(self._replicas[name], method)(name, *arguments)


def config_of(folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        device="cpu",
        dtype="float32",
        load_format="dummy",
        num_threads=1,
        max_num_batched_tokens=64,
        kv_cache_memory_bytes=2 * 2**20,
    ).resolve()


@pytest.fixture
async def replica(tmp_path: Path) -> AsyncIterator[EngineReplica]:
    write_model(tmp_path)
    one = EngineReplica()
    await one.start("replica-0", config_of(tmp_path), ("text", "info"), None)
    yield one
    await one.close()


async def text_of(llm: AsyncLLM) -> tuple[list[int], int]:
    """Returns the tokens and how many of the prompt were cached."""
    last = None
    async for output in llm.generate(PROMPT, GREEDY):
        last = output
    assert last is not None
    return list(last.outputs[0].token_ids), last.num_cached_tokens or 0


async def check_times(llm: AsyncLLM, replica: EngineReplica) -> None:
    """Clocks of two hosts differ by days; a request has waited no longer for that."""
    request = llm.prepare(llm.tokenizer.encode(PROMPT), GREEDY)
    asked = structs.replace(request, arrival_time=request.arrival_time - 86_400.0)
    times: list[float] = []
    async for data in replica.generate("replica-0", encode(asked)):
        message = decode_from_engine(data)
        assert isinstance(message, Deltas)
        times += [one.scheduled_time for one in message.deltas if one.scheduled_time]
    assert times
    assert all(0 <= time - asked.arrival_time < 60 for time in times)


async def test_an_ingress_speaks_to_a_replica_as_to_its_own_engine(
    replica: EngineReplica, tmp_path: Path
) -> None:
    config = config_of(tmp_path)
    async with AsyncLLM(config) as own:
        expected, _ = await text_of(own)
    async with AsyncLLM(config, connect=partial(RayFleet, handle=Direct(replica))) as llm:
        assert await text_of(llm) == (expected, 0)
        tokens, num_cached = await text_of(llm)
        assert tokens == expected
        assert num_cached > 0
        stats = await llm.stats()
        assert stats.num_generation_tokens == 24
        assert await replica.record_autoscaling_stats() == {KV_USE: 0.0}
        prompt = llm.tokenizer.encode(PROMPT)
        assert (await llm.explain_prefix(llm.prepare(prompt, GREEDY))).num_cached > 0
        await replica.check_health()
        await check_times(llm, replica)

        endless = SamplingParams(max_tokens=500, ignore_eos=True)
        outputs = llm.generate("x", endless, "one")
        await anext(outputs)
        await llm.abort("one")
        reasons = [output.outputs[0].finish_reason async for output in outputs]
        assert reasons[-1] == "abort"
        assert await llm.reset_prefix_cache()
        assert await text_of(llm) == (expected, 0)

        waiting = llm.generate("x", endless)
        await anext(waiting)
        replica._client.kill()
        with pytest.raises(EngineDeadError, match="replica-0 died under the request"):
            async for _ in waiting:
                pass
        with pytest.raises(EngineDeadError):
            await replica.check_health()
    assert not replica._streams
