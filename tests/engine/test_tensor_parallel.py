"""Two ranks on the CPU: their tokens are one rank's, and the death of one ends the engine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, AsyncLLM, ConfigError, EngineConfig, SamplingParams
from octavo.engine.executor import Executor
from octavo.engine.front_end import FrontEnd
from octavo.engine.load import load_core
from octavo.engine.rank_transport import RemoteRanks
from octavo.errors import EngineDeadError, OctavoError, WeightsError
from tests.engine.configs import OPTIONS
from tests.engine.prompts import greedy, prompts_of, tokens
from tests.models import tiny

NUM_BLOCKS = 16
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def engine(model: Path, size: int, **options: Any) -> Iterator[LLM]:
    llm = LLM(str(model), tensor_parallel_size=size, **{**OPTIONS, **options})
    try:
        yield llm
    finally:
        llm.close()


def run_all(model: Path, size: int, block_bytes: int) -> tuple[list[list[int]], int, int]:
    """Returns the tokens of cold, warm and parallel requests, cached tokens and preemptions."""
    prompts = prompts_of((40, 41, 3, 43, 44), seed=2)
    with engine(model, size, kv_cache_memory_bytes=NUM_BLOCKS * block_bytes) as llm:
        assert llm.plan.num_blocks == NUM_BLOCKS
        cold = tokens(llm.generate(prompts, greedy(30), use_tqdm=False))
        (warm,) = llm.generate([prompts[4]], greedy(20), use_tqdm=False)
        samples = SamplingParams(n=2, seed=5, max_tokens=8, ignore_eos=True)
        (drawn,) = llm.generate([prompts[2]], samples, use_tqdm=False)
        llm._core.check()
        num_preemptions = llm.stats().num_preemptions
    found = [*cold, warm.outputs[0].token_ids, *(one.token_ids for one in drawn.outputs)]
    return found, warm.num_cached_tokens, num_preemptions


@pytest.mark.parametrize(
    ("case", "changes", "head_bytes"),
    [
        # Ranks have a kv head in common, and share the vocabulary.
        ("qwen3-moe", {"num_key_value_heads": 1, "vocab_size": 212}, 16),
        ("qwen2-moe", {}, 8),
        ("llama-tied-biased", {"vocab_size": 212}, 8),
        # A norm of whole projections, and a clamp after it.
        ("olmoe-clipped", {"num_key_value_heads": 6}, 8),
    ],
)
def test_two_ranks_draw_the_tokens_of_one(
    case: str,
    changes: dict[str, Any],
    head_bytes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(tiny.CASES, case, {**tiny.CASES[case], **changes})
    model = tiny.save_tiny(case, tmp_path)
    config = model.config
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    page = layers * 16 * 2 * head_bytes * 4
    one = run_all(tmp_path, 1, page * heads)
    two = run_all(tmp_path, 2, page * max(heads // 2, 1))
    assert one == two
    _, num_cached, num_preemptions = two
    assert num_cached == 32
    assert num_preemptions > 0


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny("qwen3-moe", tmp_path_factory.mktemp("qwen3-moe")).folder


def test_a_killed_rank_ends_the_engine_with_its_exit_code(qwen3_moe: Path) -> None:
    with engine(qwen3_moe, 2) as llm:
        llm.generate(prompts_of((20,)), greedy(4), use_tqdm=False)
        runner = llm._core._runner
        assert isinstance(runner, Executor)
        runner._ranks[0].kill()
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="rank 1 ended with code -9"):
                llm.generate(prompts_of((20,)), greedy(4), use_tqdm=False)


def test_a_failing_rank_ends_the_engine_with_its_traceback(qwen3_moe: Path) -> None:
    with engine(qwen3_moe, 2) as llm:
        runner = llm._core._runner
        assert isinstance(runner, Executor)
        runner._ranks[0].connection.send_bytes(b"no plan")
        with pytest.raises(EngineDeadError, match=r"(?s)rank 1 failed.*Traceback.*pickle"):
            llm.generate(prompts_of((20,)), greedy(4), use_tqdm=False)


async def test_an_engine_process_with_ranks_serves_and_dies_with_them(qwen3_moe: Path) -> None:
    llm = AsyncLLM(EngineConfig(model=str(qwen3_moe), tensor_parallel_size=2, **OPTIONS))
    await llm.start()
    stream = llm.generate(prompts_of((20,))[0], greedy(100), request_id="a")
    await anext(stream)
    assert llm._client._process is not None
    (rank,) = children(llm._client._process.pid)
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="rank 1 ended with code -9"):
        async for _ in stream:
            pass
    await llm.close()


def children(pid: int) -> list[int]:
    """Returns the ids of a process's children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_weights_that_are_broken_are_named_as_by_one_rank(qwen3_moe: Path, tmp_path: Path) -> None:
    for file in qwen3_moe.iterdir():
        data = file.read_bytes()
        cut = data[: len(data) // 2] if file.suffix == ".safetensors" else data
        (tmp_path / file.name).write_bytes(cut)
    with pytest.raises(WeightsError, match="safetensors"), engine(tmp_path, 2):
        pass


@pytest.mark.parametrize(
    ("size", "says"),
    [(4, "cannot share 6 query heads evenly; use 1 or 2 or 3 or 6"), (0, "at least 1")],
)
def test_sizes_that_cannot_share_are_refused_before_anything_starts(
    qwen3_moe: Path, size: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught, engine(qwen3_moe, size):
        pass
    assert caught.value.field == "tensor_parallel_size"


JOIN = """
import sys
from octavo.engine.rank import repeat
from octavo.engine.rank_transport import join
address, key, rank = sys.argv[1:]
sys.exit(not repeat(join(address, bytes.fromhex(key), int(rank))))
"""


def test_ranks_that_others_start_come_by_address_and_draw_the_same_tokens(qwen3_moe: Path) -> None:
    prompts = prompts_of((20, 33), seed=3)
    with engine(qwen3_moe, 1) as llm:
        expected = tokens(llm.generate(prompts, greedy(6), use_tqdm=False))
    started: list[subprocess.Popen[bytes]] = []

    def announce(address: str, key: bytes) -> None:
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(bytes(100))  # whoever has no key is no rank
        command = [sys.executable, "-c", JOIN, address, key.hex(), "1"]
        started.append(subprocess.Popen(command, cwd=ROOT))

    config = EngineConfig(model=str(qwen3_moe), tensor_parallel_size=2, **OPTIONS).resolve()
    llm = LLM.__new__(LLM)
    llm.config = config
    llm._front_end = FrontEnd(config)
    llm._core = load_core(
        config, llm._front_end.files, transport=RemoteRanks("127.0.0.1", announce)
    )
    llm._input, llm._output = llm._front_end.processors(llm._core.plan.max_model_len)
    llm._num_requests = 0
    try:
        assert tokens(llm.generate(prompts, greedy(6), use_tqdm=False)) == expected
    finally:
        llm.close()
    assert started[0].wait(30) == 0


def test_ranks_that_do_not_come_are_named_with_the_address(qwen3_moe: Path) -> None:
    config = EngineConfig(model=str(qwen3_moe), tensor_parallel_size=2, **OPTIONS).resolve()
    transport = RemoteRanks("127.0.0.1", lambda address, key: None, arrival_seconds=0.2)
    files = FrontEnd(config).files
    wanted = r"rank 1 of 2 did not come to 127\.0\.0\.1:\d+ within 0\.2 s"
    with pytest.raises(EngineDeadError, match=wanted):
        load_core(config, files, transport=transport)


def test_a_host_that_is_not_here_is_refused(qwen3_moe: Path) -> None:
    config = EngineConfig(model=str(qwen3_moe), tensor_parallel_size=2, **OPTIONS).resolve()
    transport = RemoteRanks("192.0.2.1", lambda address, key: None)
    with pytest.raises(OctavoError, match=r"cannot (come to|meet at) 192"):
        load_core(config, FrontEnd(config).files, transport=transport)
