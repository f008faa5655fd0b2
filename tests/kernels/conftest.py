"""Back ends under test; each test of an op runs over both of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError
from octavo.kernels.ops import Ops
from octavo.kernels.registry import Needs, select_ops


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["reference", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return _ops_or_skip(request.param)


@pytest.fixture
def native() -> Ops:
    return _ops_or_skip("native")


def _ops_or_skip(name: str) -> Ops:
    try:
        return select_ops(name, Needs(num_threads=2))
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name, so that a failure repeats."""
    return np.random.default_rng(list(request.node.name.encode()))
