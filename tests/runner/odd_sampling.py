"""Rows whose sampling numbers are legal but extreme and whose logits are odd, and what must hold of
them on every sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from octavo.request import SamplingParams
from octavo.request_limits import SAMPLING_RANGES
from octavo.runner.sampler import SampledTokens
from octavo.step import NO_TOKEN, Int32, RowStart

_TINY = float(np.finfo(np.float32).tiny)
_HUGE = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class OddRow:
    """One sequence and the logits of its next token."""

    params: SamplingParams
    prompt: tuple[int, ...]
    outputs: tuple[int, ...]
    seed: int
    logits_V: torch.Tensor


def odd_rows(size: int) -> st.SearchStrategy[list[OddRow]]:
    """Returns steps of two to four rows over `size` ids."""
    ids = st.integers(0, size - 1)
    row = st.builds(
        OddRow,
        params=_params(ids),
        prompt=st.lists(ids, min_size=1, max_size=5).map(tuple),
        outputs=st.lists(ids, max_size=5).map(tuple),
        seed=st.integers(-(2**63), 2**63 - 1),
        logits_V=_logits(size),
    )
    return st.lists(row, min_size=2, max_size=4)


def _number(name: str, usual: float, *others: float) -> st.SearchStrategy[float]:
    """Both ends of the range, what lies close to them, and the usual."""
    low, high = SAMPLING_RANGES[name]
    return st.one_of(st.just(usual), st.sampled_from((low, high, *others)), st.floats(low, high))


def _params(ids: st.SearchStrategy[int]) -> st.SearchStrategy[SamplingParams]:
    words = st.lists(ids, min_size=1, max_size=2).map(tuple)
    return st.builds(
        SamplingParams,
        temperature=_number("temperature", 0.0, 1e-5, 1.0),
        top_p=_number("top_p", 1.0, 1e-36, 1 - 1e-16, 1 - 1e-7),
        min_p=_number("min_p", 0.0, 1e-45, _TINY, 1 - 1e-9),
        top_k=st.sampled_from((0, 1, 2, 39, 40, 41, 2**31 - 1)),
        presence_penalty=_number("presence_penalty", 0.0),
        frequency_penalty=_number("frequency_penalty", 0.0),
        repetition_penalty=_number("repetition_penalty", 1.0),
        logprobs=st.sampled_from((None, None, 0, 3, 100)),
        min_tokens=st.sampled_from((0, 0, 3)),
        logit_bias=st.none() | st.dictionaries(ids, _number("logit_bias", 1.0), max_size=3),
        allowed_token_ids=st.none() | st.lists(ids, min_size=1, max_size=3, unique=True),
        bad_words_token_ids=st.just(()) | st.lists(words, max_size=3),
    )


def _logits(size: int) -> st.SearchStrategy[torch.Tensor]:
    values = (0.0, 1.0, -1.0, 30.0, 1e-45, 1e30, -1e30, _HUGE, -_HUGE, -np.inf)
    odd = st.sampled_from((*values, np.inf, np.nan))

    def filled(value: float, changes: dict[int, float]) -> torch.Tensor:
        logits = torch.full((size,), value, dtype=torch.float32)
        for place, changed in changes.items():
            logits[place] = changed
        return logits

    def normal(seed: int) -> torch.Tensor:
        rng = np.random.default_rng(seed)
        return torch.from_numpy((3 * rng.standard_normal(size)).astype(np.float32))

    places = st.integers(0, size - 1)
    few = st.dictionaries(places, st.sampled_from(values), max_size=3)
    any_few = st.dictionaries(places, odd, max_size=3)
    return st.one_of(
        st.integers(0, 9).map(normal),
        st.builds(filled, st.sampled_from(values), few),
        st.builds(filled, st.sampled_from(values), any_few),
    )


def check_odd_rows(odd: list[OddRow], make: Callable[[int, int], Any], device: str = "cpu") -> None:
    """Samples the rows together and alone with samplers of `make(num rows, vocabulary)`, their
    logits on `device`.

    Each draws an id that exists or nothing, and the same alone as beside the others.
    """
    size = len(odd[0].logits_V)
    together = _sample(make(len(odd), size), odd, device)
    token_ids = together.token_ids.tolist()
    for i, row in enumerate(odd):
        alone = _sample(make(1, size), [row], device)
        assert alone.token_ids.tolist() == [token_ids[i]]
        token = token_ids[i]
        assert token == NO_TOKEN or 0 <= token < size
        is_reported = token != NO_TOKEN and row.params.logprobs is not None
        assert (i in together.logprobs) == is_reported
        if is_reported:
            found = together.logprobs[i]
            assert found.token_ids[0] == token
            assert len(found.token_ids) == 1 + min(row.params.logprobs or 0, size)
            assert not np.isnan(found.logprobs).any()
            assert 1 <= found.rank <= size
        _check_token(row, token)


def _check_token(row: OddRow, token: int) -> None:
    """What is sound gets a token, and one that could be drawn."""
    logits_V, params = row.logits_V, row.params
    best = logits_V.max().item()
    if not np.isfinite(best):
        assert token == NO_TOKEN
    elif not params.has_penalties or abs(logits_V[logits_V.isfinite()]).max() <= 1e30:
        assert token != NO_TOKEN
        allowed = params.allowed_token_ids
        assert allowed is None or token in allowed
        assert allowed is not None or logits_V[token] > -np.inf


def _sample(sampler: Any, odd: list[OddRow], device: str) -> SampledTokens:
    for i, row in enumerate(odd):
        sampler.start_row(
            RowStart(
                row=i,
                params=row.params,
                seed=row.seed,
                stop_token_ids=(0, 1),
                prompt_len=len(row.prompt),
                token_ids=np.array([*row.prompt, *row.outputs], np.int32),
            )
        )
    rows: Int32 = np.arange(len(odd), dtype=np.int32)
    indices: Int32 = np.array([len(row.outputs) for row in odd], np.int32)
    logits_SV = torch.stack([row.logits_V for row in odd]).to(device)
    return sampler.sample(logits_SV, rows, indices)
