"""The runner does what a plan says: rows, copies, log-probabilities, counts, errors."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from octavo.errors import OctavoError
from octavo.kernels.ops import Ops
from octavo.kernels.reference import ReferenceOps
from octavo.models.decoder import Decoder
from octavo.request import SamplingParams
from octavo.runner.model_runner import PROMPT_TILE, ModelRunner
from octavo.step import NO_TOKEN, PageCopy, Runner, StepPlan
from tests.models.parity import assert_parity, load, prompts
from tests.models.tiny import TinyModel, save_tiny
from tests.runner.driver import GREEDY, Driver, Tracked

WINDOWED = "qwen2-moe-window"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    torch.set_num_threads(1)
    return save_tiny(WINDOWED, tmp_path_factory.mktemp(WINDOWED))


@pytest.fixture(scope="module")
def ops() -> Ops:
    return ReferenceOps(1)


@pytest.fixture(scope="module")
def decoder(tiny: TinyModel, ops: Ops) -> Decoder:
    return load(tiny, ops, 256)


def prompt(decoder: Decoder, length: int) -> list[int]:
    return prompts(decoder.spec.vocab_size, (length,))[0]


def test_a_model_runner_is_a_runner(decoder: Decoder) -> None:
    with Driver(decoder) as driver:
        runner: Runner = driver.runner
        assert isinstance(runner, ModelRunner)


def test_a_forked_sequence_continues_from_copied_blocks(tiny: TinyModel, decoder: Decoder) -> None:
    with Driver(decoder) as driver:
        parent = driver.add(prompt(decoder, 21))
        driver.step([(parent, 21)])
        child = driver.fork(parent)
        child.tokens[-1] = (parent.tokens[-1] + 1) % decoder.spec.vocab_size
        child.prompt_len += 1  # its own token now stands where the parent's output does
        for _ in range(4):
            driver.step([(parent, 1), (child, 1)])
    assert_parity(tiny, parent)
    assert_parity(tiny, child)
    assert parent.tokens[22:] != child.tokens[22:]


def test_a_preempted_sequence_comes_back_in_another_row_with_other_blocks(
    tiny: TinyModel, decoder: Decoder
) -> None:
    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 30))
        driver.step([(sequence, 30)])
        driver.decode([sequence], 4)
        driver.free(sequence)
        other = driver.add(prompt(decoder, 40))  # takes the freed row
        assert other.row == sequence.row
        again = driver.add(sequence.tokens)
        again.prompt_len = sequence.prompt_len
        driver.step([(other, 40), (again, 20)])
        driver.step([(again, 15), (other, 1)])
        driver.decode([again, other], 3)
    assert_parity(tiny, again)
    assert_parity(tiny, other)
    assert again.tokens[: len(sequence.tokens)] == sequence.tokens


@pytest.mark.parametrize("chunks", [(150,), (1, 63, 65, 21), (PROMPT_TILE, 86)])
def test_prompt_logprobs_are_those_of_the_logits_however_chunked(
    decoder: Decoder, chunks: Sequence[int]
) -> None:
    params = structs.replace(GREEDY, prompt_logprobs=2)
    found = []
    with Driver(decoder) as driver:
        plain = driver.add(prompt(decoder, 9))
        sequence = driver.add(prompt(decoder, 150), params)
        driver.step([(plain, 9)])
        for count in chunks:
            result = driver.step([(plain, 1), (sequence, count)])
            assert set(result.prompt_logprobs) == {1}
            found += result.prompt_logprobs[1]
        result = driver.step([(sequence, 1)])
        assert result.prompt_logprobs == {}
    assert len(found) == 149
    expected = torch.stack(sequence.logits[:149]).log_softmax(-1)
    for position, entry in enumerate(found):
        token = sequence.tokens[position + 1]
        assert entry.token_ids[0] == token
        assert entry.logprobs[0] == pytest.approx(expected[position, token].item(), abs=1e-5)
        assert len(entry.token_ids) == 3
        rank = int((expected[position] > expected[position, token]).sum()) + 1
        assert entry.rank == rank


def test_expert_counts_tell_where_every_token_went(decoder: Decoder) -> None:
    with Driver(decoder) as driver:
        first, second = driver.add(prompt(decoder, 17)), driver.add(prompt(decoder, 5))
        together = driver.step([(first, 17), (second, 5)]).expert_counts
    with Driver(decoder) as driver:
        first, second = driver.add(prompt(decoder, 17)), driver.add(prompt(decoder, 5))
        alone = [driver.step([(s, n)]).expert_counts for s, n in ((first, 17), (second, 5))]
    assert together is not None
    assert together.dtype == np.int64
    assert together.shape == (3, 5)
    assert (together.sum(axis=1) == 2 * 22).all()
    assert alone[0] is not None
    assert alone[1] is not None
    np.testing.assert_array_equal(together, alone[0] + alone[1])


def test_a_dense_model_counts_no_experts(ops: Ops, tmp_path: Path) -> None:
    dense = load(save_tiny("llama", tmp_path), ops, 64)
    with Driver(dense, max_model_len=64) as driver:
        sequence = driver.add(prompt(dense, 5))
        assert driver.step([(sequence, 5)]).expert_counts is None


def test_a_step_without_sampling_rows_returns_no_tokens(decoder: Decoder) -> None:
    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 20))
        result = driver.step([(sequence, 8)])
    assert result.step_id == 0
    assert result.token_ids.shape == (0,)
    assert result.token_ids.dtype == np.int32


def test_logprobs_are_keyed_by_sampling_row(decoder: Decoder) -> None:
    params = SamplingParams(temperature=0.0, logprobs=1)
    with Driver(decoder) as driver:
        chunked, plain = driver.add(prompt(decoder, 20)), driver.add(prompt(decoder, 4))
        asking = driver.add(prompt(decoder, 6), params)
        result = driver.step([(chunked, 8), (plain, 4), (asking, 6)])
    assert set(result.logprobs) == {1}
    assert result.logprobs[1].token_ids[0] == asking.tokens[-1]


def test_launch_returns_while_the_step_before_still_runs(decoder: Decoder) -> None:
    held = threading.Event()

    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 6))
        blocker = driver.runner._lane.do(lambda: held.wait(60))
        launched = driver.launch([(sequence, 6)])
        ahead = driver.launch([(sequence, 1)])
        assert not blocker.done()
        held.set()
        driver.collect(launched)
        driver.collect(ahead)
    assert len(sequence.outputs) == 2


class BrokenOps(ReferenceOps):
    """Fails in the middle of a step while `broken` is set."""

    broken = False

    def route(self, *arguments, **named):  # type: ignore[override]
        if self.broken:
            raise MemoryError("no memory in the middle of a step")
        return super().route(*arguments, **named)


def test_a_failed_step_raises_at_collect_and_the_next_one_works(tiny: TinyModel) -> None:
    broken = BrokenOps(1)
    decoder = load(tiny, broken, 256)
    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 12))
        broken.broken = True
        _, ticket = driver.launch([(sequence, 12)])
        with pytest.raises(MemoryError, match="middle of a step"):
            driver.runner.collect(ticket)
        broken.broken = False
        sequence.num_computed = sequence.num_pending = 0
        driver.step([(sequence, 12)])
        driver.decode([sequence], 2)
    assert_parity(tiny, sequence)


def test_a_step_launched_behind_one_that_raised_does_nothing(tiny: TinyModel) -> None:
    broken = BrokenOps(1)
    decoder = load(tiny, broken, 256)
    with Driver(decoder) as driver:
        sequence, other = driver.add(prompt(decoder, 12)), driver.add(prompt(decoder, 5))
        broken.broken = True
        _, first = driver.launch([(sequence, 12)])
        _, behind = driver.launch([(sequence, 1), (other, 5)])
        with pytest.raises(MemoryError):
            driver.runner.collect(first)
        broken.broken = False
        with pytest.raises(OctavoError, match="dropped"):
            driver.runner.collect(behind)
        for one in (sequence, other):
            one.num_computed = one.num_pending = 0
            one.started = False
        driver.step([(sequence, 12), (other, 5)])
        driver.decode([sequence, other], 2)
    assert_parity(tiny, sequence)


def test_a_token_that_reads_poisoned_memory_is_none(decoder: Decoder) -> None:
    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 20))
        driver.step([(sequence, 20)])
        driver._freed_blocks.append(sequence.blocks[0][0])
        driver.decode([sequence], 1)
    assert sequence.tokens[-1] == NO_TOKEN


@pytest.mark.parametrize("kv_format", ["bfloat16", "float16"])
def test_a_short_kv_format_stays_near_the_float32_one(decoder: Decoder, kv_format: str) -> None:
    logits = []
    for name in ("float32", kv_format):
        with Driver(decoder, kv_format=name) as driver:
            sequence = driver.add(prompt(decoder, 40))
            driver.step([(sequence, 40)])
        logits.append(torch.stack(sequence.logits))
    difference = (logits[0] - logits[1]).abs().max()
    assert 0 < difference < 0.05 * logits[0].abs().max()


def test_read_only_plan_arrays_are_fine_since_plans_travel_as_bytes(decoder: Decoder) -> None:
    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 8))
        (plan, _), ticket = driver.launch([(sequence, 8)])
        driver.runner.collect(ticket)
        values = {name: getattr(plan, name) for name in StepPlan.__dataclass_fields__}
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                values[name] = np.frombuffer(value.tobytes(), value.dtype)
        again = driver.runner.collect(driver.runner.launch(StepPlan(**values)))
    assert len(again.token_ids) == 1


@pytest.mark.parametrize("seed", range(4))
def test_random_plans_give_transformers_logits(
    tiny: TinyModel, decoder: Decoder, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    finished: list[Tracked] = []
    running: list[Tracked] = []
    with Driver(decoder, max_num_seqs=5, num_blocks=60, seed=seed) as driver:
        while len(finished) < 6:
            if driver.free_rows and rng.random() < 0.5:
                length = int(rng.integers(1, 70))
                running.append(driver.add(rng.integers(0, 211, length).tolist()))
            chunks = []
            for sequence in rng.permutation(np.array([None, *running], object)):
                if sequence is not None and rng.random() < 0.8:
                    missing = len(sequence.tokens) - sequence.num_computed
                    chunks.append((sequence, int(rng.integers(1, missing + 1))))
            if chunks:
                driver.step(chunks)
            for sequence in [s for s in running if len(s.outputs) > 4]:
                running.remove(sequence)
                finished.append(sequence)
                driver.free(sequence)
    for sequence in finished:
        assert_parity(tiny, sequence)


def test_a_plan_without_rows_moves_pages_and_gives_nothing(decoder: Decoder) -> None:
    none = np.zeros(0, np.int32)
    with Driver(decoder) as driver:
        sequence = driver.add(prompt(decoder, 12))
        driver.step([(sequence, 12)])
        source = sequence.blocks[0][0]
        target = driver.free_blocks.pop()
        plan = StepPlan(
            step_id=driver.step_id,
            rows=none,
            starts=none,
            query_lens=none,
            token_ids=none,
            from_device=none == 1,
            purposes=none.astype(np.int8),
            copies=(PageCopy(0, source, target),),
        )
        result = driver.runner.collect(driver.runner.launch(plan))
        pages = driver.runner.storage.pages(0)
        assert torch.equal(pages[target], pages[source])
    assert (len(result.token_ids), result.token_starts.tolist(), result.num_splits) == (0, [0], 0)
