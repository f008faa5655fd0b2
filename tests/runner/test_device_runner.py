"""The device's runner without a model's cost: KV is the token ids themselves, and the next token
is a digest of the context as read back through the block tables."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs

from octavo.errors import EngineDeadError, OctavoError, OutOfMemoryError
from octavo.step import StepPlan, TokenLogprobs, token_purposes
from tests.runner.driver import GREEDY, Tracked

from octavo.runner.device import COUNTS_PERIOD  # isort: skip
from octavo.runner.device_batch import largest_upload  # isort: skip
from octavo.runner.graphs import StepShape  # isort: skip
from octavo.runner.step_sizes import StepSizes  # isort: skip
from octavo.runner.warm_up import make_step, steps_to_capture  # isort: skip
from tests.runner.token_driver import NUM_EXPERTS, VOCAB, FakeDriver, expected


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def check(*sequences: Tracked) -> None:
    for sequence in sequences:
        assert sequence.outputs
        known = sequence.tokens[: sequence.prompt_len]
        assert sequence.outputs == expected(known, len(sequence.outputs))


def test_sampled_tokens_feed_the_next_steps_before_they_are_collected() -> None:
    with FakeDriver() as driver:
        first, second = driver.add(prompt(20)), driver.add(prompt(37, 1))
        launched = [driver.launch([(first, 20), (second, 37)])]
        launched.append(driver.launch([(second, 1), (first, 1)]))
        third = driver.add(prompt(18, 2))
        launched.append(driver.launch([(third, 18), (first, 1), (second, 1)]))
        launched += [driver.launch([(second, 1), (third, 1), (first, 1)]) for _ in range(30)]
        for step in launched:
            driver.collect(step)
        check(first, second, third)
        assert [len(s.outputs) for s in (first, second, third)] == [33, 33, 31]


def test_rows_blocks_and_tables_change_hands_and_freed_blocks_are_poisoned() -> None:
    with FakeDriver(num_blocks=12, max_num_seqs=3, max_model_len=64) as driver:
        kept = driver.add(prompt(17))
        driver.step([(kept, 17)])
        for seed in range(1, 9):
            guest = driver.add(prompt(30 + seed, seed))
            driver.step([(guest, 30 + seed), (kept, 1)])
            driver.decode([kept, guest], 2)
            check(kept, guest)
            gone = guest.blocks[0][0]
            driver.free(guest)
            driver.step([(kept, 1)])
            assert driver.runner.storage.layer(0).key[gone].isnan().all()
        check(kept)


def test_a_forked_sequence_goes_on_from_a_copied_block() -> None:
    with FakeDriver() as driver:
        parent = driver.add(prompt(21))
        driver.step([(parent, 21)])
        child = driver.fork(parent)
        child.tokens[-1] = (parent.tokens[-1] + 1) % VOCAB
        child.prompt_len += 1
        for _ in range(14):
            driver.step([(child, 1), (parent, 1)])
        check(parent, child)
        assert parent.blocks[0][0] == child.blocks[0][0]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 7, 9, 11])
def test_padding_of_a_decode_step_changes_nothing(num_rows: int) -> None:
    with FakeDriver(max_num_seqs=11, num_blocks=64) as driver:
        sequences = [driver.add(prompt(9 + i, i)) for i in range(num_rows)]
        driver.step([(s, s.prompt_len) for s in sequences])
        driver.decode(sequences, 9)
        check(*sequences)
        sizes = StepSizes(11)
        size = next(size for size in sizes.decodes if size >= num_rows)
        assert driver.decoder.sizes[-9:] == [(size, num_rows)] * 9
        tokens = sum(s.prompt_len for s in sequences)
        (few,) = sizes.mixed.values()
        assert driver.decoder.sizes[0] == (next(n for n in few if n >= tokens), tokens)


@pytest.mark.parametrize("max_tokens", [64, 90])
def test_a_step_without_memory_is_split_counted_and_gives_the_same_tokens(max_tokens: int) -> None:
    found: list[Any] = []
    for limit in (10**6, max_tokens):
        with FakeDriver(num_blocks=64, max_model_len=512) as driver:
            params = structs.replace(GREEDY, logprobs=1, prompt_logprobs=1)
            long = driver.add(prompt(200, 1), params)
            others = [
                driver.add(prompt(9 * i + 4, i), structs.replace(GREEDY, logprobs=0))
                for i in (2, 3)
            ]
            driver.step([(s, s.prompt_len) for s in others])
            ahead = driver.add(prompt(15, 5))
            driver.decoder.max_tokens = limit
            result = driver.step([(others[0], 1), (long, 200), (ahead, 15), (others[1], 1)])
            driver.decoder.max_tokens = 10**6
            driver.decode([long, *others, ahead], 3)
            check(long, ahead, *others)
            assert result.prompt_logprobs.keys() == {1}
            assert len(result.prompt_logprobs[1]) == 199
            assert result.logprobs.keys() == {0, 1, 3}
            found.append(result)
    whole, split = found
    assert whole.num_splits == 0
    assert split.num_splits >= 217 // max_tokens
    assert split.token_ids.tolist() == whole.token_ids.tolist()
    for part in ("logprobs", "prompt_logprobs"):
        np.testing.assert_equal(flat(getattr(split, part)), flat(getattr(whole, part)))


def flat(logprobs: dict[int, Any]) -> dict[int, Any]:
    return {
        index: [
            (one.token_ids.tolist(), one.logprobs.tolist(), one.rank)
            for one in (found if isinstance(found, tuple) else (found,))
        ]
        for index, found in logprobs.items()
    }


def test_a_step_that_cannot_be_split_raises_when_collected_and_the_next_one_runs() -> None:
    with FakeDriver() as driver:
        sequence, other = driver.add(prompt(40)), driver.add(prompt(12, 1))
        driver.step([(other, 12)])
        driver.decoder.max_tokens = 0
        failed = driver.launch([(sequence, 40), (other, 1)])
        driver.decoder.max_tokens = 10**6
        with pytest.raises(OutOfMemoryError, match="64 tokens"):
            driver.collect(failed)
        sequence.num_computed, other.num_computed = 0, 12
        sequence.num_pending = other.num_pending = 0
        driver.step([(sequence, 40), (other, 1)])
        driver.decode([sequence, other], 4)
        check(sequence, other)


def test_an_error_in_a_step_is_raised_by_its_own_collect_and_drops_the_step_behind() -> None:
    with FakeDriver() as driver:
        sound = driver.add(prompt(12))
        first = driver.launch([(sound, 12)])
        broken = driver.runner.launch(bad_plan(step_id=70))
        _, behind = driver.launch([(sound, 1)])
        driver.collect(first)
        with pytest.raises(IndexError):
            driver.runner.collect(broken)
        with pytest.raises(OctavoError, match="dropped"):
            driver.runner.collect(behind)
        sound.num_computed, sound.num_pending = 12, 0
        driver.decode([sound], 3)
        check(sound)


def test_an_error_after_which_the_device_is_lost_ends_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FakeDriver() as driver:
        broken = driver.runner.launch(bad_plan(step_id=70))
        monkeypatch.setattr(driver.runner._lane, "is_usable", lambda: False)
        with pytest.raises(EngineDeadError, match="used no more: IndexError") as caught:
            driver.runner.collect(broken)
        assert isinstance(caught.value.__cause__, IndexError)


def bad_plan(step_id: int) -> StepPlan:
    """Names a row that does not exist."""
    one = np.array([1], np.int32)
    return StepPlan(
        step_id=step_id,
        rows=100 * one,
        starts=0 * one,
        query_lens=one,
        token_ids=one,
        from_device=one == 0,
        purposes=token_purposes(one == 1),
    )


def test_prompt_logprobs_are_those_of_the_logits() -> None:
    with FakeDriver() as driver:
        sequence = driver.add(prompt(90), structs.replace(GREEDY, prompt_logprobs=2))
        found: list[TokenLogprobs] = []
        for count in (50, 1, 39):
            found += driver.step([(sequence, count)]).prompt_logprobs[0]
        assert driver.step([(sequence, 1)]).prompt_logprobs == {}
        logits = torch.stack(sequence.logits[:89]).log_softmax(-1)
        for position, entry in enumerate(found):
            token = sequence.tokens[position + 1]
            assert entry.token_ids[0] == token
            assert entry.logprobs[0] == pytest.approx(logits[position, token].item(), abs=1e-5)
        assert len(found) == 89


def test_expert_counts_are_what_was_new_since_the_last_report() -> None:
    with FakeDriver(num_blocks=64, max_model_len=512) as driver:
        sequence, other = driver.add(prompt(11)), driver.add(prompt(5, 1))
        driver.step_id = 1
        reports: list[np.ndarray] = []
        launched = [driver.launch([(sequence, 11), (other, 5)])]
        for _ in range(2 * COUNTS_PERIOD):  # one step ahead, as the engine does
            launched.append(driver.launch([(sequence, 1), (other, 1)]))
            result = driver.collect(launched.pop(0))
            is_first = result.step_id == 1  # launched while nothing ran: it might be the last
            is_told = is_first or result.step_id % COUNTS_PERIOD == 0
            assert (result.expert_counts is not None) == is_told
            if result.expert_counts is not None:
                reports.append(result.expert_counts)
        last = driver.collect(launched.pop(0))  # nothing follows it
        assert last.expert_counts is not None
        reports.append(last.expert_counts)
        assert [int(report.sum()) for report in reports] == [16, 2 * 63, 2 * COUNTS_PERIOD, 2]
        computed = [t for s in (sequence, other) for t in s.tokens[: s.num_computed]]
        ids = np.array(computed) % NUM_EXPERTS
        np.testing.assert_array_equal(
            np.sum(reports, axis=0)[0], np.bincount(ids, minlength=NUM_EXPERTS)
        )


def test_a_step_that_only_builds_its_kernels_is_not_met_by_graphs() -> None:
    """Else the first step that runs would be captured, before its kernels were ever loaded."""
    with FakeDriver() as driver:
        rehearsal = driver.rehearsal()
        rehearsal.build(make_step(5, 1, VOCAB))
        assert rehearsal.step_bytes == 0
        assert not driver.graphs._met
        rehearsal.run(make_step(5, 1, VOCAB))
        assert len(driver.graphs._met) == 1
        sequence = driver.add(prompt(20))
        driver.step([(sequence, 20)])
        driver.decode([sequence], 3)
        check(sequence)


def test_a_warm_up_leaves_no_trace() -> None:
    with FakeDriver() as driver:
        rehearsal = driver.rehearsal()
        for step in (make_step(5, 1, VOCAB), make_step(2, 30, VOCAB)):
            rehearsal.run(step)
        sequence = driver.add(prompt(20))
        counts = driver.step([(sequence, 20)]).expert_counts  # step 0 reports
        assert counts is not None
        assert counts.sum() == 20
        driver.decode([sequence], 3)
        check(sequence)
        assert rehearsal.step_bytes >= 0


def test_every_size_is_run_and_then_captured_before_the_first_request() -> None:
    with FakeDriver(max_num_seqs=3) as driver:
        shapes: list[StepShape] = []
        run = driver.graphs.run
        driver.graphs.run = lambda shape, body: (shapes.append(shape), run(shape, body))[1]
        rehearsal = driver.rehearsal()
        for step in steps_to_capture(3, 100, 50, VOCAB):
            rehearsal.capture(step)
        sizes = [(3, 3), (2, 2), (1, 1), (16, 128), (16, 64)]
        assert [(one.num_rows, one.num_tokens) for one in shapes[::2]] == sizes
        assert shapes[::2] == shapes[1::2]
        assert {one.bounds for one in shapes} == {None}
        sequence = driver.add(prompt(20))
        driver.step([(sequence, 20)])
        driver.decode([sequence], 3)
        check(sequence)
        assert set(shapes[10:]) <= set(shapes[:10]), "a request met a shape first"


def test_the_room_for_uploads_holds_the_largest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepSizes, "padded", lambda self, plan: None)
    sizes: list[int] = []
    with FakeDriver() as driver:
        transfer: Any = driver.runner._transfer
        upload = transfer.upload
        transfer.upload = lambda packed: (sizes.append(len(packed)), upload(packed))[1]
        for lengths in ((90,), (30, 1, 44), (1,) * 8):
            sequences = [driver.add(prompt(length, length)) for length in lengths]
            driver.step([(one, one.prompt_len) for one in sequences])
            plan: Any = SimpleNamespace(
                groups=driver.groups,
                max_num_batched_tokens=sum(lengths),
                max_num_seqs=len(lengths),
            )
            assert max(sizes) <= largest_upload(plan)
            sizes.clear()
            for one in sequences:
                driver.free(one)
