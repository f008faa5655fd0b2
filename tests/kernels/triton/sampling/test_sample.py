"""The sampling kernels against the host's sampler and a draw spelt out in Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.request import SamplingParams
from octavo.runner.random import philox
from octavo.runner.sampler import _kept
from tests.kernels.triton.interpreter import DEVICE

from octavo.kernels.triton.sampling import thresholds as search  # isort: skip
from octavo.kernels.triton.sampling.draw import choose
from octavo.kernels.triton.sampling.params import ROW_PARAMS
from octavo.kernels.triton.sampling.thresholds import find_thresholds


def make_params(rows: list[dict[str, Any]]) -> Tensor:
    """Rows of ROW_PARAMS on the device: those of a greedy row, but for what is given."""
    params = np.zeros(len(rows), dtype=ROW_PARAMS)
    params["top_p"], params["repetition"], params["slot"] = 1, 1, -1
    for i, fields in enumerate(rows):
        for name, value in fields.items():
            params[i][name] = value
    return torch.from_numpy(params.view(np.int32).reshape(len(rows), -1)).to(DEVICE)


def make_batch(indices: list[int]) -> Tensor:
    return torch.tensor([[i, index] for i, index in enumerate(indices)], dtype=torch.int32).to(
        DEVICE
    )


def run_choose(
    logits: Tensor, params: Tensor, batch: Tensor, thresholds: Tensor | None = None
) -> tuple[list[int], list[int]]:
    """Returns the tokens, and what was last sampled."""
    last = torch.full((len(params),), -7, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros((0, logits.shape[1]), dtype=torch.int32, device=DEVICE)
    thresholds = batch if thresholds is None else thresholds
    tokens = choose(logits.to(DEVICE), batch, params, thresholds, last, counts)
    return tokens.tolist(), last.tolist()


def normal(rng: np.random.Generator, *shape: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


@pytest.mark.parametrize("size", [1, 2, 4096, 4099])
def test_greedy_takes_the_lowest_of_the_best(rng: np.random.Generator, size: int) -> None:
    logits = normal(rng, 3, size)
    logits[1, [size - 1, size // 2]] = 77.0
    logits[2] = -0.0
    logits[2, size - 1] = 0.0
    tokens, last = run_choose(torch.from_numpy(logits), make_params([{}] * 3), make_batch([0] * 3))
    assert tokens == last == logits.argmax(1).tolist()


@pytest.mark.parametrize("inv_temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [5, 4101])
def test_a_broken_row_gets_no_token_and_its_neighbour_its_own(
    rng: np.random.Generator, size: int, inv_temperature: float
) -> None:
    logits = normal(rng, 5, size)
    logits[1, size - 2] = math.nan
    logits[2, 3] = math.inf
    logits[3] = -math.inf
    logits[4] = -math.inf
    logits[4, 2] = -5.0
    params = make_params([{"inv_temperature": inv_temperature, "seed": 3}] * 5)
    alone, _ = run_choose(torch.from_numpy(logits[:1]), params[:1], make_batch([0]))
    tokens, last = run_choose(torch.from_numpy(logits), params, make_batch([0] * 5))
    assert tokens == [alone[0], -1, -1, -1, 2]
    assert last == [alone[0], 0, 0, 0, 2]


def specified_draw(logits: NDArray[np.float32], inv_temperature: float, seed: int, i: int) -> int:
    """The draw as the module's docstring has it, in float64."""
    fours = range(-(-len(logits) // 4))
    key = (seed & 0xFFFFFFFF, seed >> 32)
    words = np.array([philox((four, i, 0, 0), key) for four in fours]).flatten()[: len(logits)]
    exponential = -np.log1p(-(words + 0.5) * 2.0**-32)
    return int((logits * np.float64(inv_temperature) - np.log(exponential)).argmax())


@pytest.mark.parametrize("size", [7, 4203])
def test_a_draw_is_the_gumbel_max_of_philox(rng: np.random.Generator, size: int) -> None:
    logits = normal(rng, 9, size, scale=0.5)
    logits[:, 1] = -math.inf
    seeds = [int(s) for s in rng.integers(0, 2**64, size=9, dtype=np.uint64)]
    indices = rng.integers(0, 2**31, size=9).tolist()
    temperatures = [0.01, 0.5, 1.0] * 3
    rows = [
        {"inv_temperature": 1 / t, "seed": seed}
        for t, seed in zip(temperatures, seeds, strict=True)
    ]
    tokens, _ = run_choose(torch.from_numpy(logits), make_params(rows), make_batch(indices))
    assert tokens == [
        specified_draw(row, 1 / t, seed, i)
        for row, t, seed, i in zip(logits, temperatures, seeds, indices, strict=True)
    ]


def test_specified_draws_come_out_as_often_as_the_softmax_says() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, 3.0, 0.5, -2.0, 1.5], dtype=np.float32)
    wanted = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    times = 10_000
    found = np.bincount(
        [specified_draw(logits, 1 / 0.7, 2**40 + 9, i) for i in range(times)], minlength=8
    )
    chi2 = ((found - wanted * times) ** 2 / (wanted * times)).sum()
    assert chi2 < 30  # 7 degrees of freedom: exceeded once in 10,000 seeds


FILTERS: tuple[dict[str, Any], ...] = (
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.001},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.7, "temperature": 0.6},
    {"min_p": 0.02, "top_k": 50, "top_p": 0.8, "temperature": 1.5},
    {"min_p": 1e-3, "top_p": 0.97, "temperature": 2.0},
    {"top_k": 600},
)


@pytest.mark.parametrize("room", [search.CANDIDATES, 16])
@pytest.mark.parametrize(("size", "scale", "step"), [(700, 3.0, 0.25), (4103, 1.0, 0.0)])
def test_the_kept_ids_are_those_of_the_host(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    size: int,
    scale: float,
    step: float,
) -> None:
    monkeypatch.setattr(search, "CANDIDATES", room)
    filters = FILTERS if size < 1000 else FILTERS[1:7:2]
    logits = normal(rng, len(filters), size, scale=scale)
    if step:
        logits = np.round(logits / step).astype(np.float32) * np.float32(step)
    logits[0, : size // 2] = -math.inf
    asked = [SamplingParams(**f) for f in filters]
    rows = [
        {"inv_temperature": 1 / p.temperature}
        | {name: getattr(p, name) for name in ("top_k", "top_p", "min_p")}
        for p in asked
    ]
    thresholds = find_thresholds(
        torch.from_numpy(logits).to(DEVICE), make_batch([0] * len(rows)), make_params(rows)
    ).cpu()
    for x, params, (bits, last) in zip(logits, asked, thresholds.numpy(), strict=True):
        value = bits.view(np.float32)
        found = (x > value) | ((x == value) & (np.arange(size) <= last))
        scaled = x / np.float32(params.temperature)
        kept = _kept(np.exp(scaled - scaled.max()), params)
        assert kept is not None
        wanted = np.zeros(size, dtype=np.bool_)
        wanted[kept] = True
        possible = x > -math.inf
        assert (found & possible).tolist() == (wanted & possible).tolist(), params


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [({"top_k": 3}, 3), ({"top_p": 0.3}, 3), ({"min_p": 0.4}, 10), ({"top_k": 9, "top_p": 0.5}, 5)],
)
def test_equal_logits_keep_the_lowest_ids(fields: dict[str, Any], wanted: int) -> None:
    logits = torch.tensor([[0.0, -0.0] * 5], device=DEVICE)
    thresholds = find_thresholds(
        logits, make_batch([0]), make_params([{"inv_temperature": 1.0} | fields])
    )
    assert thresholds[0, :1].view(torch.float32) == 0  # of either sign
    assert min(int(thresholds[0, 1]), 9) == wanted - 1


def test_only_kept_ids_are_drawn_and_all_of_them() -> None:
    logits = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 2.0]).expand(60, -1).contiguous()
    params = make_params([{"inv_temperature": 1.0, "top_k": 4, "seed": 5}] * 60)
    batch = make_batch(list(range(60)))
    thresholds = find_thresholds(logits.to(DEVICE)[:1], batch[:1], params[:1])
    tokens, _ = run_choose(logits, params, batch, thresholds.expand(60, -1).contiguous())
    assert set(tokens) == {0, 2, 3, 6}


def test_thresholds_of_a_broken_row_are_found_too() -> None:
    logits = torch.zeros(3, 9)
    logits[0] = -math.inf
    logits[1, 4] = math.inf
    logits[2, 4] = math.nan
    fields = {"inv_temperature": 1.0, "top_k": 3, "top_p": 0.5}
    thresholds = find_thresholds(logits.to(DEVICE), make_batch([0] * 3), make_params([fields] * 3))
    assert thresholds.shape == (3, 2)
