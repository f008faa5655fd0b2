"""The sampler against plain specifications, and the independence of a row from its batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from octavo.errors import OctavoError
from octavo.request import SamplingParams
from octavo.runner import sampler as sampler_module
from octavo.runner.random import philox, uniform
from octavo.runner.sampler import Sampler, _changed, _kept, _Row, prompt_logprobs
from octavo.step import NO_TOKEN, RowStart
from tests.runner.odd_sampling import OddRow, check_odd_rows, odd_rows

V = 5000


def logits_of(seed: int, rows: int = 1, size: int = V, scale: float = 3.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.standard_normal((rows, size)) * scale).astype(np.float32))


def start(row: int = 0, seed: int = 1, prompt=(5,), outputs=(), stop=(), **params: Any) -> RowStart:
    return RowStart(
        row=row,
        params=SamplingParams(**params),
        seed=seed,
        stop_token_ids=tuple(stop),
        prompt_len=len(prompt),
        token_ids=np.array([*prompt, *outputs], dtype=np.int32),
    )


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def draw(logits: torch.Tensor, row_start: RowStart, index: int = 0) -> int:
    sampler = Sampler(logits.shape[1], row_start.row + 1)
    sampler.start_row(row_start)
    return int(sampler.sample(logits, int32(row_start.row), int32(index)).token_ids[0])


def drawn_ids(logits: torch.Tensor, times: int = 400, **params: Any) -> set[int]:
    """The ids that come out over many output indices."""
    sampler = Sampler(logits.shape[1], 1)
    sampler.start_row(start(**params))
    return {int(sampler.sample(logits, int32(0), int32(i)).token_ids[0]) for i in range(times)}


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(counter, key) == words


def test_uniform_is_spread_evenly_and_differs_by_seed_and_index():
    values = np.array([uniform(seed, index) for seed in (-1, 0, 7) for index in range(1000)])
    assert len(set(values)) == 3000
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert counts.min() > 230
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_greedy_takes_the_largest_logit_and_the_lowest_id_among_equals():
    logits = logits_of(1, rows=4)
    logits[1, [70, 30, 90]] = 99.0
    sampler = Sampler(V, 8)
    for row in range(4):
        sampler.start_row(start(row=row, temperature=0.0))
    tokens = sampler.sample(logits, int32(0, 1, 2, 3), int32(0, 0, 0, 0)).token_ids
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [*logits[:1].argmax(1).tolist(), 30, *logits[2:].argmax(1).tolist()]


@pytest.mark.parametrize(
    "params", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.4}, {"temperature": 0}]
)
def test_equal_logits_keep_the_lowest_ids(params):
    logits = torch.zeros(1, 10)
    kept = drawn_ids(logits, **params)
    wanted = {"top_k": 3, "top_p": 3, "min_p": 10, "temperature": 1}[next(iter(params))]
    assert kept == set(range(wanted))


def specified_kept(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """The plain specification: full softmax, full sort."""
    probs, ids = (logits[0].double() / params.temperature).softmax(0).sort(descending=True)
    keep = probs >= params.min_p * probs[0]
    if params.top_k:
        keep[params.top_k :] = False
    probs = probs * keep
    probs /= probs.sum()
    keep &= probs.cumsum(0) - probs < params.top_p
    return set(ids[keep].tolist())


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 1},
        {"top_k": 40},
        {"top_p": 0.001},
        {"top_p": 0.9},
        {"top_p": 0.999},
        {"min_p": 0.05},
        {"min_p": 0.02, "top_k": 50, "top_p": 0.8, "temperature": 0.7},
        {"min_p": 1e-4, "top_p": 0.95, "temperature": 1.5},
    ],
)
def test_the_kept_set_is_that_of_a_full_sort(params, scale):
    logits = logits_of(11, scale=scale)
    sampling = SamplingParams(**params)
    scaled = logits[0].numpy() / np.float32(sampling.temperature)
    kept = _kept(np.exp(scaled - scaled.max()), sampling)
    kept = np.arange(V) if kept is None else kept
    wanted = specified_kept(logits, sampling)
    # One token at the boundary may fall on either side: the sums are rounded differently.
    assert len(wanted ^ set(kept.tolist())) <= 1
    assert (np.diff(kept) > 0).all()


@pytest.mark.parametrize("params", [{}, {"top_k": 6}, {"top_p": 0.95}, {"temperature": 0.5}])
def test_tokens_come_out_as_often_as_their_probability_says(params):
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0, 0.5, -2.0, 1.5]])
    sampling = SamplingParams(**params)
    probs = (logits[0].double() / sampling.temperature).softmax(0)
    kept = specified_kept(logits, sampling)
    probs = np.array([p if i in kept else 0.0 for i, p in enumerate(probs.tolist())])
    probs /= probs.sum()
    sampler = Sampler(8, 1)
    sampler.start_row(start(seed=123, **params))
    times = 4000
    counts = np.zeros(8)
    for index in range(times):
        counts[sampler.sample(logits, int32(0), int32(index)).token_ids[0]] += 1
    assert counts[probs == 0].sum() == 0
    used = probs > 0
    chi2 = ((counts - probs * times)[used] ** 2 / (probs * times)[used]).sum()
    assert chi2 < 30  # 7 degrees of freedom: exceeded once in 10,000 seeds


def test_a_token_without_probability_is_never_drawn_not_even_by_the_number_zero(monkeypatch):
    monkeypatch.setattr(sampler_module, "uniform", lambda seed, index: 0.0)
    logits = torch.zeros(1, 10)
    logits[0, :3] = -1e4
    assert draw(logits, start()) == 3
    monkeypatch.setattr(sampler_module, "uniform", lambda seed, index: 1 - 2.0**-52)
    logits[0, 7:] = -1e4
    assert draw(logits, start()) == 6


MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"top_k": 20, "logprobs": 3},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"presence_penalty": 1.0, "min_p": 0.01},
    {"logit_bias": {3: 50.0}, "bad_words_token_ids": ((3, 3), (4,))},
    {"allowed_token_ids": (1, 2, 3, 4, 5, 6, 7), "min_tokens": 4},
)


def test_a_row_draws_the_same_alone_in_a_batch_in_another_row_and_after_preemption():
    steps = 12
    alone: list[list[int]] = []
    for i, params in enumerate(MIXED):
        sampler = Sampler(V, 1)
        sampler.start_row(start(seed=i, prompt=(1, 2, 3), stop=(7,), **params))
        alone.append(
            [
                int(sampler.sample(logits_of(100 * i + t), int32(0), int32(t)).token_ids[0])
                for t in range(steps)
            ]
        )
    sampler = Sampler(V, 32)
    place = {i: 31 - 2 * i for i in range(len(MIXED))}
    for i, params in enumerate(MIXED):
        sampler.start_row(start(row=place[i], seed=i, prompt=(1, 2, 3), stop=(7,), **params))
    together: list[list[int]] = [[] for _ in MIXED]
    for t in range(steps):
        if t == 6:  # preempted: every sequence comes back in another row
            for row in place.values():
                sampler.free_row(row)
            place = {i: i + 3 for i in place}
            for i, params in enumerate(MIXED):
                again = start(
                    row=place[i], seed=i, prompt=(1, 2, 3), outputs=together[i], stop=(7,), **params
                )
                sampler.start_row(again)
        order = np.random.default_rng(t).permutation(len(MIXED))
        logits = torch.cat([logits_of(100 * i + t) for i in order])
        rows = np.array([place[i] for i in order], dtype=np.int32)
        drawn = sampler.sample(logits, rows, np.full(len(order), t, dtype=np.int32))
        for i, token in zip(order, drawn.token_ids.tolist(), strict=True):
            together[i].append(token)
        assert set(drawn.logprobs) == {list(order).index(2)}
    assert together == alone


def test_sampling_leaves_the_logits_as_they_were():
    logits = logits_of(5)
    before = logits.clone()
    draw(logits, start(repetition_penalty=2.0, logit_bias={1: 3.0}, min_tokens=1, stop=(2,)))
    assert torch.equal(logits, before)


def test_penalties_follow_their_formulas_over_prompt_and_outputs():
    logits = logits_of(9, size=50)
    params: dict[str, Any] = {
        "repetition_penalty": 1.7,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.5,
    }
    prompt, outputs = [1, 2, 2, 3], [3, 4, 4, 4]
    wanted = logits[0].numpy().copy()
    for token in {1, 2, 3, 4}:
        value = wanted[token]
        wanted[token] = value / 1.7 if value > 0 else value * 1.7
        times = outputs.count(token)
        wanted[token] -= 0.3 * times + 0.5 * (times > 0)
    state = _Row.from_start(start(prompt=prompt, outputs=outputs[:2], **params), 50)
    for token in outputs[2:]:
        state.append(token)
    np.testing.assert_allclose(_changed(logits[0].numpy(), state, 4, None), wanted, rtol=1e-6)


def test_penalties_grow_past_their_first_room():
    logits = torch.zeros(1, 400)
    sampler = Sampler(400, 1)
    sampler.start_row(start(prompt=range(100), temperature=0.0, presence_penalty=1.0))
    tokens = [int(sampler.sample(logits, int32(0), int32(t)).token_ids[0]) for t in range(300)]
    assert tokens == list(range(300))


def test_stop_ids_cannot_be_drawn_before_min_tokens():
    logits = torch.zeros(1, 10)
    logits[0, 4] = 50.0
    logits[0, 6] = 40.0
    sampler = Sampler(10, 1)
    sampler.start_row(start(temperature=0.0, min_tokens=2, stop=(4,)))
    tokens = [int(sampler.sample(logits, int32(0), int32(t)).token_ids[0]) for t in range(3)]
    assert tokens == [6, 6, 4]


def test_bans_give_way_when_nothing_else_is_allowed():
    logits = logits_of(3, size=10)
    assert draw(logits, start(allowed_token_ids=[4], min_tokens=2, stop=(4,))) == 4


def test_an_allowed_id_can_be_drawn_even_at_minus_infinity():
    logits = torch.full((1, 10), -torch.inf)
    logits[0, 2] = 1.0
    assert drawn_ids(logits, times=20, allowed_token_ids=[4]) == {4}
    assert draw(logits, start(allowed_token_ids=[4], temperature=0.0)) == 4


def test_bad_words_ban_their_last_token_only_after_the_others():
    logits = torch.zeros(1, 10)
    logits[0, 3] = 9.0
    logits[0, 5] = 8.0
    sampler = Sampler(10, 1)
    sampler.start_row(
        start(temperature=0.0, prompt=(3, 3), bad_words_token_ids=((3, 3, 3), (8,), (5, 9)))
    )
    tokens = [int(sampler.sample(logits, int32(0), int32(t)).token_ids[0]) for t in range(6)]
    assert tokens == [3, 3, 5, 3, 3, 5]
    assert draw(logits, start(temperature=0.0, bad_words_token_ids=((3,), (5,)))) == 0


def test_allowed_ids_and_bias_shape_what_is_drawn():
    logits = logits_of(8, size=20)
    assert drawn_ids(torch.zeros(1, 20), allowed_token_ids=[2, 9, 11]) == {2, 9, 11}
    assert drawn_ids(logits, logit_bias={7: 100.0}) == {7}
    assert draw(logits, start(temperature=0.0, logit_bias={7: 100.0})) == 7
    assert 7 not in drawn_ids(torch.zeros(1, 20), logit_bias={7: -100.0})


def test_reported_logprobs_are_those_of_the_raw_logits_with_rank():
    logits = logits_of(21)
    wanted = logits[0].double().log_softmax(0)
    sampler = Sampler(V, 1)
    sampler.start_row(
        start(temperature=0.5, repetition_penalty=1.5, logprobs=5, logit_bias={77: 99})
    )
    result = sampler.sample(logits, int32(0), int32(0))
    found = result.logprobs[0]
    top = wanted.topk(5)
    assert found.token_ids.tolist() == [77, *top.indices.tolist()]
    np.testing.assert_allclose(found.logprobs, wanted[found.token_ids.tolist()], atol=1e-5)
    assert found.rank == int((wanted > wanted[77]).sum()) + 1


def test_logprobs_of_equal_logits_rank_by_id():
    found = prompt_logprobs(torch.zeros(2, 6), int32(3, 0), 2)
    assert [f.token_ids.tolist() for f in found] == [[3, 0, 1], [0, 0, 1]]
    assert [f.rank for f in found] == [4, 1]
    assert prompt_logprobs(torch.zeros(1, 6), int32(3), 0)[0].token_ids.tolist() == [3]


def test_prompt_logprobs_equal_log_softmax_row_by_row():
    logits = logits_of(33, rows=7, size=300)
    targets = np.arange(7, dtype=np.int32)
    wanted = logits.double().log_softmax(1)
    for i, found in enumerate(prompt_logprobs(logits, targets, 4)):
        np.testing.assert_allclose(found.logprobs, wanted[i][found.token_ids.tolist()], atol=1e-5)
        assert found.token_ids[1:].tolist() == wanted[i].topk(4).indices.tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_of_broken_logits_gets_no_token_and_its_neighbour_its_own(temperature, broken):
    logits = logits_of(2, rows=2, size=10)
    logits[1, 5] = broken
    sampler = Sampler(10, 8)
    for row in (2, 6):
        sampler.start_row(start(row=row, temperature=temperature))
    alone = sampler.sample(logits[:1], int32(2), int32(0)).token_ids.tolist()
    assert sampler.sample(logits, int32(2, 6), int32(0, 0)).token_ids.tolist() == [*alone, NO_TOKEN]


def test_a_wrong_vocabulary_is_an_error_with_both_shapes():
    sampler = Sampler(12, 1)
    sampler.start_row(start())
    with pytest.raises(OctavoError, match=r"\(1, 10\).*\(1, 12\)"):
        sampler.sample(torch.zeros(1, 10), int32(0), int32(0))


def test_a_stop_id_that_only_the_tokenizer_knows_harms_nothing():
    logits = torch.zeros(1, 10)
    assert draw(logits, start(temperature=0.0, min_tokens=2, stop=(4, 12))) == 0


@settings(max_examples=300, deadline=None)
@given(odd_rows(size=40))
def test_extreme_legal_numbers_on_odd_logits_draw_an_id_or_nothing_and_harm_no_neighbour(
    odd: list[OddRow],
):
    check_odd_rows(odd, lambda num_rows, size: Sampler(size, num_rows))


def test_a_huge_logit_is_drawn_at_the_lowest_temperature():
    logits = torch.tensor([[1e38, 3e38, -3e38, 2e38]])
    assert drawn_ids(logits, times=20, temperature=1e-5) == {1}


def test_logits_that_penalties_blow_up_give_no_token():
    logits = torch.tensor([[3e38, 1.0, 2.0]])
    wanted = {0.0: NO_TOKEN, 1.0: NO_TOKEN}
    for temperature, token in wanted.items():
        params: dict[str, Any] = {"temperature": temperature, "repetition_penalty": 0.01}
        assert draw(logits, start(prompt=(0,), **params)) == token
        assert draw(logits, start(prompt=(0,), top_p=0.5, min_p=0.1, **params)) == token


@pytest.mark.parametrize("value", [-np.inf, np.inf, np.nan, np.finfo(np.float32).max])
def test_log_probabilities_of_odd_logits_never_raise(value: float):
    logits = torch.full((3, 6), value)
    logits[1, 2] = 0.0
    logits[2, :3] = -np.inf
    for found in prompt_logprobs(logits, int32(3, 2, 0), 4):
        assert found.token_ids[0] in (3, 2, 0)
        assert found.rank >= 1
