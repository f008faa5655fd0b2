"""Rows for vectors beside rows for tokens, on the host and through a device's equipment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.models.decoder import Decoder
from octavo.models.pooler import Pooler
from octavo.models.pooling_spec import PoolingSpec, Reads
from octavo.runner.pooled_rows import PooledRows
from octavo.step import Float32, Purpose, RowStart, StepPlan
from tests.models.parity import drive, load_or_skip, ops_or_skip
from tests.models.tiny import save_tiny
from tests.runner.driver import GREEDY, Tracked

READS: tuple[Reads, ...] = ("last", "mean", "cls")


@pytest.fixture(scope="module")
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("tiny")
    return load_or_skip(save_tiny("qwen3", folder), ops_or_skip(request.param), 64)


def with_pooler(decoder: Decoder, reads: Reads) -> Decoder:
    """It still has its head for tokens, so that both can be compared."""
    return replace(decoder, pooler=Pooler(spec=PoolingSpec(kind="embed", reads=reads)))


def expected_logits(sequence: Tracked, reads: Reads) -> torch.Tensor:
    """The head is linear: the logits of a mean are the mean of the logits."""
    logits_TV = torch.stack(sequence.logits)
    return {"last": logits_TV[-1], "mean": logits_TV.mean(0), "cls": logits_TV[0]}[reads]


# Through the interpreter a case takes a minute: there the one that reads every row.
@pytest.mark.parametrize(
    ("decoder", "reads"),
    [*(("native", reads) for reads in READS), ("triton", "mean")],
    indirect=["decoder"],
)
def test_vectors_come_beside_tokens(decoder: Decoder, reads: Reads) -> None:
    pooled = with_pooler(decoder, reads)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 211, length).tolist() for length in (9, 20, 5)]
    with drive(pooled, max_model_len=64) as driver:
        chat = driver.add(prompts[0])
        chunked, short = (driver.add(ids, wants_vector=True) for ids in prompts[1:])
        assert driver.step([(chat, 9), (chunked, 7)]).vectors == {}
        second = driver.step([(chunked, 6), (chat, 1), (short, 5)])
        third = driver.step([(chat, 1), (chunked, 7)])
        assert set(second.vectors) == {2}
        assert set(third.vectors) == {1}
        assert second.token_starts.tolist() == [0, 0, 1, 1]
        assert third.token_starts.tolist() == [0, 1, 1]
        assert len(chat.outputs) == 3
        found = ((short, second.vectors[2]), (chunked, third.vectors[1]))
        for sequence, vector in found:
            state_SM = torch.from_numpy(vector)[None].to(driver.device)
            logits = pooled.logits(state_SM).cpu()[0]
            difference = (logits - expected_logits(sequence, reads)).abs().max()
            assert difference < 1e-3, reads


@pytest.mark.parametrize("decoder", ["native"], indirect=True)
def test_a_row_that_is_taken_again_begins_its_sum_anew(decoder: Decoder) -> None:
    pooled = with_pooler(decoder, "mean")
    prompt = list(range(30, 48))
    with drive(pooled, max_model_len=64) as driver:
        first = driver.add(prompt, wants_vector=True)
        driver.step([(first, 10)])  # and is preempted
        driver.free(first)
        again = driver.add(prompt, wants_vector=True)
        assert again.row == first.row
        vector = driver.step([(again, len(prompt))]).vectors[0]
        driver.free(again)
        other = driver.add(prompt, GREEDY, wants_vector=True)
        expected = driver.step([(other, len(prompt))]).vectors[0]
    np.testing.assert_array_equal(vector, expected)


def plan_of(rows: Sequence[tuple[int, int, int, bool]]) -> StepPlan:
    """A step of (row, start, tokens, whether its vector is wanted)."""
    purposes = [Purpose.VECTOR if is_last else Purpose.NONE for *_, is_last in rows]
    return StepPlan(
        step_id=0,
        rows=np.array([row for row, *_ in rows], np.int32),
        starts=np.array([start for _, start, *_ in rows], np.int32),
        query_lens=np.array([count for _, _, count, _ in rows], np.int32),
        token_ids=np.zeros(sum(count for _, _, count, _ in rows), np.int32),
        from_device=np.zeros(len(rows), np.bool_),
        purposes=np.array(purposes, np.int8),
    )


def start_of(row: int) -> RowStart:
    return RowStart(
        row=row,
        params=GREEDY,
        seed=0,
        stop_token_ids=(),
        prompt_len=1,
        token_ids=np.zeros(1, np.int32),
        wants_vector=True,
    )


def read(pooled: PooledRows, states: Sequence[torch.Tensor], plan: StepPlan) -> list[Float32]:
    tokens = [
        states[row][start : start + count]
        for row, start, count in zip(plan.rows, plan.starts, plan.query_lens, strict=True)
    ]
    starts = np.concatenate(([0], np.cumsum(plan.query_lens))).astype(np.int32)
    found = pooled.read(torch.cat(tokens), plan, starts, torch.from_numpy)
    return [] if found is None else list(found.numpy())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(READS), st.lists(st.integers(1, 90), min_size=1, max_size=4), st.data())
def test_chunks_and_steps_that_come_twice_change_no_bit(
    reads: Reads, lengths: list[int], data: st.DataObject
) -> None:
    states = [torch.randn(length, 5, generator=torch.manual_seed(length)) for length in lengths]
    pooled = PooledRows(reads, len(lengths), 5, torch.device("cpu"))
    for row in range(len(lengths)):
        pooled.start(start_of(row))
    done = [0] * len(lengths)
    vectors: dict[int, Float32] = {}
    while len(vectors) < len(lengths):
        step = []
        for row, length in enumerate(lengths):
            if row not in vectors:
                count = data.draw(st.integers(1, length - done[row]))
                step.append((row, done[row], count, done[row] + count == length))
        found = read(pooled, states, plan_of(step))
        if data.draw(st.booleans()):  # memory was short behind it
            found = read(pooled, states, plan_of(step))
        for row, _, count, _ in step:
            done[row] += count
        vectors.update(zip((row for row, *_, is_last in step if is_last), found, strict=True))
    for row, each in enumerate(states):
        alone = PooledRows(reads, 1, 5, torch.device("cpu"))
        alone.start(start_of(0))
        [whole] = read(alone, [each], plan_of([(0, 0, len(each), True)]))
        np.testing.assert_array_equal(vectors[row], whole)
        wide = each.double()
        right = {"last": wide[-1], "mean": wide.mean(0), "cls": wide[0]}[reads]
        np.testing.assert_allclose(whole, right.float().numpy(), rtol=1e-6, atol=1e-7)
