"""How much of a call runs at once."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from octavo.request import RequestError, SamplingParams
from octavo.server.asked_params import MANY_LISTED, asked_params
from octavo.server.call import LISTED_AT_ONCE, Call
from octavo.server.exchange import Exchange


def num_at_once(**params: Any) -> int:
    exchange = Exchange(request_id="one")
    wanted = SamplingParams(**params)
    call = Call(id="one", created=0, params=wanted, requests=(), exchange=exchange)
    return call.num_at_once(256)


@pytest.mark.parametrize(("n", "expected"), [(1, 256), (3, 85), (64, 4)])
def test_as_many_sequences_run_at_once_as_a_step_holds(n: int, expected: int):
    assert num_at_once(n=n) == expected
    assert num_at_once(n=n, logit_bias={7: -100, 8: 2.5}, stop_token_ids=[3]) == expected


MANY = list(range(50_000))


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": MANY},
        {"stop_token_ids": MANY},
        {"logit_bias": dict.fromkeys(MANY, 1.0)},
    ],
)
def test_few_of_those_that_list_many_tokens_run_at_once(params: dict[str, Any]):
    assert num_at_once(**params) == LISTED_AT_ONCE // len(MANY)
    assert num_at_once(**params, n=2) == LISTED_AT_ONCE // len(MANY) // 2
    assert num_at_once(**params, n=64) == 1


def test_lists_count_together():
    both = {"allowed_token_ids": MANY, "logit_bias": dict.fromkeys(MANY, 1.0)}
    assert num_at_once(**both) == LISTED_AT_ONCE // (2 * len(MANY))


@pytest.mark.parametrize("num_biases", [0, 1, MANY_LISTED, MANY_LISTED + 1])
def test_many_biases_are_read_beside_the_event_loop(num_biases: int):
    threads = list[int]()

    class Body:
        logit_bias = dict.fromkeys(map(str, range(num_biases)), 1.0)

        def to_params(self, defaults: object) -> SamplingParams:
            threads.append(threading.get_ident())
            if num_biases == 1:
                raise RequestError("no", param="logit_bias")
            return SamplingParams(max_tokens=num_biases + 1)

    if num_biases == 1:
        with pytest.raises(RequestError, match="no"):
            asyncio.run(asked_params(Body(), {}))
    else:
        assert asyncio.run(asked_params(Body(), {})).max_tokens == num_biases + 1
    assert (threads == [threading.get_ident()]) == (num_biases <= MANY_LISTED)
