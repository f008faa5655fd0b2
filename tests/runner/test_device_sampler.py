"""The device's sampler against the host's, and the independence of a row from its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from octavo.errors import OctavoError
from octavo.request import SamplingParams
from octavo.runner.sampler import Sampler, prompt_logprobs
from octavo.step import NO_TOKEN, Int32, RowStart
from tests.kernels.triton.interpreter import DEVICE
from tests.runner.odd_sampling import OddRow, check_odd_rows, odd_rows

from octavo.kernels.triton.sampling.kernels import KERNELS  # isort: skip
from octavo.runner.device_sampler import DeviceSampler  # isort: skip

V = 300


def make(max_num_seqs: int, size: int = V) -> DeviceSampler:
    return DeviceSampler(size, max_num_seqs, torch.device(DEVICE), KERNELS)


def logits_of(seed: int, rows: int = 1, size: int = V) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((rows, size)) * 3).astype(np.float32)).to(DEVICE)


def start(row: int = 0, seed: int = 1, prompt=(5,), outputs=(), stop=(), **params: Any) -> RowStart:
    return RowStart(
        row=row,
        params=SamplingParams(**params),
        seed=seed,
        stop_token_ids=tuple(stop),
        prompt_len=len(prompt),
        token_ids=np.array([*prompt, *outputs], dtype=np.int32),
    )


def int32(*values: int) -> Int32:
    return np.array(values, dtype=np.int32)


def draw(sampler: DeviceSampler | Sampler, logits: Tensor, row: int, index: int) -> int:
    return int(sampler.sample(logits.clone(), int32(row), int32(index)).token_ids[0])


MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"top_k": 20, "top_p": 0.9, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"presence_penalty": 1.0, "min_p": 0.01, "logprobs": 0},
    {"logit_bias": {3: 50.0}, "bad_words_token_ids": ((3,), (4,)), "logprobs": 2},
    {"allowed_token_ids": (1, 2, 3, 4, 5, 6, 7), "min_tokens": 3},
)


def test_a_row_draws_the_same_alone_in_a_batch_in_another_row_and_after_preemption():
    steps = 5
    alone: list[list[int]] = []
    for i, params in enumerate(MIXED):
        sampler = make(1)
        sampler.start_row(start(seed=i - 3, prompt=(1, 2, 3), stop=(7,), **params))
        alone.append([draw(sampler, logits_of(100 * i + t), 0, t) for t in range(steps)])
    sampler = make(32)
    place = {i: 31 - 2 * i for i in range(len(MIXED))}
    for i, params in enumerate(MIXED):
        sampler.start_row(start(row=place[i], seed=i - 3, prompt=(1, 2, 3), stop=(7,), **params))
    together: list[list[int]] = [[] for _ in MIXED]
    for t in range(steps):
        if t == 2:  # preempted: every sequence comes back in another row
            for row in place.values():
                sampler.free_row(row)
            place = {i: i + 3 for i in place}
            for i, params in enumerate(MIXED):
                known = {"prompt": (1, 2, 3), "outputs": together[i], "stop": (7,)}
                sampler.start_row(start(row=place[i], seed=i - 3, **known, **params))
        order = np.random.default_rng(t).permutation(len(MIXED))
        logits = torch.cat([logits_of(100 * i + t) for i in order])
        rows = np.array([place[i] for i in order], dtype=np.int32)
        drawn = sampler.sample(logits, rows, np.full(len(order), t, dtype=np.int32))
        assert drawn.token_ids.dtype == torch.int32
        assert torch.equal(sampler.last_sampled[rows], drawn.token_ids)
        for i, token in zip(order, drawn.token_ids.tolist(), strict=True):
            together[i].append(token)
        assert set(drawn.logprobs) == {list(order).index(i) for i in (2, 4, 5)}
    assert together == alone


def test_limited_rows_take_what_the_host_takes_and_leave_their_neighbours_alone():
    limited = [{**params, "temperature": 0.0} for params in MIXED[5:]]
    asked = [{"top_k": 9}, *limited, {"temperature": 0.0, "presence_penalty": 0.5}]
    mixed, pure, host = make(4), make(4), Sampler(V, 4)
    for row, params in enumerate(asked):
        one = start(row=row, seed=row, stop=(7,), **params)
        for sampler in (mixed, host, *([pure] if row in (0, 3) else [])):
            sampler.start_row(one)
    for t in range(5):
        logits = logits_of(t, rows=4)
        indices = int32(t, t, t, t)
        expected = host.sample(logits.cpu().clone(), int32(0, 1, 2, 3), indices)
        neighbours = pure.sample(logits[[0, 3]], int32(0, 3), indices[:2]).token_ids.tolist()
        found = mixed.sample(logits, int32(0, 1, 2, 3), indices)
        tokens = found.token_ids.tolist()
        assert tokens[1:3] == expected.token_ids.tolist()[1:3]
        assert [tokens[0], tokens[3]] == neighbours
        assert mixed.last_sampled.tolist() == tokens
        assert list(found.logprobs) == [1]
        assert found.logprobs[1].logprobs.tolist() == expected.logprobs[1].logprobs.tolist()


@pytest.mark.parametrize("size", [V, 64])
def test_masked_rows_take_what_the_host_takes(size: int):
    asked: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.0, "logit_bias": {5: 90.0, 6: -3.0}, "logprobs": 2},
        {"temperature": 0.0, "allowed_token_ids": (1, 2, 3)},
        {"temperature": 0.0, "bad_words_token_ids": ((8,), (9,)), "presence_penalty": 1.0},
        {"temperature": 0.0, "min_tokens": 3},
        {"top_k": 1},
    )
    count = len(asked)
    device, host = make(count, size), Sampler(size, count)
    for row, params in enumerate(asked):
        one = start(row=row, seed=row, stop=(7, size + 3), **params)
        device.start_row(one)
        host.start_row(one)
    rows = np.arange(count, dtype=np.int32)
    rng = np.random.default_rng(size)
    for t in range(6):
        is_allowed = rng.random((count, -(-size // 32) * 32)) < (0.05 if t % 2 else 0.5)
        is_allowed[:, size:] = False
        is_allowed[:, [7, 8]] = True
        masks = np.packbits(is_allowed, axis=1, bitorder="little").view(np.uint32)
        logits = logits_of(t, rows=count, size=size)
        indices = np.full(count, t, dtype=np.int32)
        expected = host.sample(logits.cpu().clone(), rows, indices, masks)
        found = device.sample(logits, rows, indices, masks=masks)
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert device.last_sampled.tolist() == found.token_ids.tolist()
        assert all(is_allowed[row, token] for row, token in enumerate(found.token_ids.tolist()))
        assert list(found.logprobs) == [1]


def test_greedy_tokens_after_penalties_are_those_of_the_host():
    asked: tuple[dict[str, Any], ...] = (
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.8},
        {"repetition_penalty": 0.6, "frequency_penalty": -0.4, "presence_penalty": 0.3},
        {"frequency_penalty": 2.0, "presence_penalty": -1.0},
        {},
    )
    count = len(asked)
    rng = np.random.default_rng(7)
    device, host = make(count), Sampler(V, count)
    rows = np.arange(count, dtype=np.int32)
    for row, params in enumerate(asked):
        prompt, outputs = rng.integers(0, V, size=150), rng.integers(0, 9, size=40)
        one = start(row=row, prompt=prompt, outputs=outputs, temperature=0.0, **params)
        device.start_row(one)
        host.start_row(one)
    logits = logits_of(1, rows=count) * 0.3
    for t in range(25):
        indices = np.full(count, 40 + t, dtype=np.int32)
        expected = host.sample(logits.cpu().clone(), rows, indices).token_ids
        found = device.sample(logits.clone(), rows, indices).token_ids
        assert found.tolist() == expected.tolist(), t


def test_a_freed_slot_starts_empty_and_slots_grow_with_the_rows_in_use():
    sampler = make(9)
    logits = torch.zeros(1, V, device=DEVICE)
    penalised: dict[str, Any] = {"temperature": 0.0, "presence_penalty": 1.0}
    for row in range(9):
        sampler.start_row(start(row=row, **penalised))
        assert [draw(sampler, logits, row, t) for t in range(3)] == [0, 1, 2]
    assert [draw(sampler, logits, row, 3) for row in range(9)] == [3] * 9
    for row in (2, 7):
        sampler.free_row(row)
        sampler.start_row(start(row=row, outputs=(0, 1), **penalised))
    assert [draw(sampler, logits, row, 4) for row in (2, 7, 3)] == [2, 2, 4]
    sampler.start_row(start(row=3, temperature=0.0))
    sampler.start_row(start(row=4, **penalised))
    assert [draw(sampler, logits, row, 4) for row in (3, 4, 5)] == [0, 0, 4]


@pytest.mark.parametrize("params", [{"top_k": 3}, {"min_tokens": 1, "top_k": 3}])
def test_reported_logprobs_are_those_of_the_raw_logits(params: dict[str, Any]):
    logits = logits_of(8)
    raw = logits.cpu().clone()
    sampler = make(1)
    sampler.start_row(start(temperature=2.0, repetition_penalty=1.5, logprobs=4, **params))
    found = sampler.sample(logits, int32(0), int32(0))
    (wanted,) = prompt_logprobs(raw, found.token_ids.cpu().numpy(), 4)
    assert found.logprobs[0].token_ids.tolist() == wanted.token_ids.tolist()
    assert found.logprobs[0].logprobs.tolist() == wanted.logprobs.tolist()
    assert found.logprobs[0].rank == wanted.rank


def test_broken_rows_get_no_token_whatever_they_asked():
    asked = [{"temperature": 0.0}, *MIXED, {"top_p": 0.5}]
    sampler = make(len(asked))
    for row, params in enumerate(asked):
        sampler.start_row(start(row=row, seed=row, **params))
    rows = np.arange(len(asked), dtype=np.int32)
    logits = logits_of(3, rows=len(asked))
    best = int(logits[0].argmax())
    logits[1:, 5] = float("nan")
    for t in range(2):
        found = sampler.sample(logits.clone(), rows, np.full(len(asked), t, dtype=np.int32))
        assert found.token_ids.tolist() == [best] + [NO_TOKEN] * (len(asked) - 1)
        assert sampler.last_sampled.tolist() == [best] + [0] * (len(asked) - 1)
        assert found.logprobs == {}


def test_a_step_that_samples_nothing_gives_nothing():
    found = make(2).sample(torch.zeros(0, V, device=DEVICE), int32(), int32())
    assert found.token_ids.tolist() == []


def test_a_wrong_vocabulary_is_an_error_with_both_shapes():
    sampler = make(1)
    sampler.start_row(start())
    with pytest.raises(OctavoError, match=rf"\(1, 10\).*\(1, {V}\)"):
        sampler.sample(torch.zeros(1, 10, device=DEVICE), int32(0), int32(0))


@settings(  # Without shrinking, which takes minutes through the interpreter.
    max_examples=40, deadline=None, phases=(Phase.reuse, Phase.generate), report_multiple_bugs=False
)
@given(odd_rows(size=40))
def test_extreme_legal_numbers_on_odd_logits_draw_an_id_or_nothing_and_harm_no_neighbour(
    odd: list[OddRow],
):
    check_odd_rows(odd, make, DEVICE)
