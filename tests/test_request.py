"""What SamplingParams and Request refuse: numbers that float32, int32 or int64 cannot hold."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from octavo.errors import RequestError
from octavo.request import Request, SamplingParams, pack_ids
from octavo.request_limits import MAX_INT, SAMPLING_RANGES

HUGE = 10**29
"""More than 64 bits, and more than a float32's digits."""
VAST = 10**5000
"""More digits than Python writes."""


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("temperature", 100.1, "0..100"),
        ("temperature", math.nan, "0..100"),
        ("temperature", VAST, "0..100"),
        ("top_p", 0, "1e-37..1"),
        ("top_p", 1e-40, "1e-37..1"),
        ("top_p", 1.0000001, "1e-37..1"),
        ("min_p", -1e-40, "0..1"),
        ("repetition_penalty", 1e-38, "0.01..100"),
        ("repetition_penalty", math.inf, "0.01..100"),
        ("presence_penalty", -2.1, "-2..2"),
        ("frequency_penalty", 1e39, "-2..2"),
        ("frequency_penalty", -VAST, "-2..2"),
        ("logit_bias", {4: 1e39}, "-100..100"),
        ("logit_bias", {4: -VAST}, "-100..100"),
        ("logit_bias", {4: math.nan}, "-100..100"),
        ("logit_bias", {HUGE: 1}, str(MAX_INT)),
        ("logit_bias", [4], "a map"),
        ("top_k", HUGE, str(MAX_INT)),
        ("top_k", -2, "-1.."),
        ("seed", 2**63, str(2**63 - 1)),
        ("seed", -(2**63) - 1, str(-(2**63))),
        ("max_tokens", HUGE, str(MAX_INT)),
        ("min_tokens", VAST, str(MAX_INT)),
        ("n", VAST, "1..64"),
        ("logprobs", HUGE, "0..100"),
        ("prompt_logprobs", HUGE, "0..100"),
        ("stop_token_ids", [HUGE], str(MAX_INT)),
        ("allowed_token_ids", [VAST], str(MAX_INT)),
    ],
    ids=lambda value: value if isinstance(value, str) else "value",
)
def test_a_number_out_of_range_is_refused_with_its_field_and_the_limit(
    name: str, value: Any, limit: str
):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    assert limit in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(("name", "ends"), SAMPLING_RANGES.items())
def test_both_ends_of_a_range_are_legal(name: str, ends: tuple[float, float]):
    for end in ends:
        SamplingParams(**{name: {3: end} if name == "logit_bias" else end})


@pytest.mark.parametrize("priority", [HUGE, -VAST, MAX_INT + 1, True, 1.5], ids=range(5))
def test_a_priority_out_of_range_is_refused(priority: Any):
    with pytest.raises(RequestError, match=str(MAX_INT)) as caught:
        Request(
            request_id="a",
            packed_prompt=pack_ids([1]),
            params=SamplingParams(),
            priority=priority,
        )
    assert caught.value.param == "priority"


# -- as vLLM's users write them ------------------------------------------------------------------


def test_parameters_can_be_changed_and_copies_are_apart():
    params = SamplingParams(max_tokens=7)
    copy = params.clone()
    params.max_tokens, params.stop = 5, ("x",)
    assert (params.max_tokens, copy.max_tokens, copy.stop) == (5, 7, ())


def test_a_changed_parameter_is_read_and_checked_when_it_is_used():
    params = SamplingParams()
    changed: Any = "end"
    params.stop, params.top_k = changed, -1
    assert (params.clone().stop, params.clone().top_k) == (("end",), 0)
    params.temperature = -1.0
    with pytest.raises(RequestError, match=r"temperature must be a number in 0\.\.100, got -1"):
        params.clone()
    with pytest.raises(AttributeError):
        params.max_tokns = 5  # type: ignore[attr-defined]


def test_numbers_and_lists_of_numpy_are_taken_as_plain_ones():
    computed: dict[str, Any] = {
        "temperature": np.float32(0.5),
        "max_tokens": np.int64(5),
        "stop_token_ids": np.array([5, 6]),
    }
    params = SamplingParams(**computed)
    assert (params.temperature, params.max_tokens, params.stop_token_ids) == (0.5, 5, (5, 6))
    assert (type(params.temperature), type(params.max_tokens)) == (float, int)
    with pytest.raises(RequestError, match=r"temperature must be a number in 0\.\.100"):
        SamplingParams(temperature=np.array([0.5, 0.7]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("best_of", 1),
        ("structured_outputs", None),
        ("use_beam_search", False),
        ("spaces_between_special_tokens", True),
        ("truncate_prompt_tokens", None),
        ("extra_args", {}),
    ],
)
def test_fields_of_vllms_that_ask_for_nothing_are_taken(name: str, value: Any):
    assert SamplingParams(**{name: value}) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("best_of", 2, "best_of is not supported: ask for n samples and choose"),
        ("structured_outputs", {"json": {}}, "structured_outputs must be null or Structured"),
        ("guided_json", {}, "guided_json is not supported: use structured_outputs"),
        ("output_kind", 2, "output_kind is not supported"),
        ("truncate_prompt_tokens", 5, "cut the prompt's ids yourself"),
        ("temprature", 1, "no field 'temprature'; did you mean temperature?"),
        ("mood", 1, "no field 'mood'$"),
    ],
)
def test_others_are_refused_by_name_and_reason(name: str, value: Any, words: str):
    with pytest.raises(RequestError, match=words) as refused:
        SamplingParams(**{name: value})
    assert refused.value.param == name
