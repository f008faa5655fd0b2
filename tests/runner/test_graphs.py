"""When a padded step is captured, and what a capture that fails says; the graphs are fakes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.runner.graphs import MAX_BOUND_GRAPHS, StepGraphs, StepShape


class FakeGraph:
    """Counts replays; a capture cannot be ended once its body has failed."""

    replays = 0

    def capture_begin(self, **options: object) -> None: ...

    def capture_end(self) -> None:
        if Body.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        FakeGraph.replays += 1


class Body:
    """A step's body that counts its runs."""

    is_broken = False

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> Tensor:
        self.runs += 1
        if Body.is_broken:
            raise torch.OutOfMemoryError("no room for a graph")
        return torch.zeros(1)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(FakeGraph, "replays", 0)
    monkeypatch.setattr(Body, "is_broken", False)
    return StepGraphs(is_on=True)


def shape(num_rows: int, bounds: int | None = None) -> StepShape:
    return StepShape(num_rows=num_rows, num_tokens=num_rows, is_decode=True, bounds=bounds)


def test_a_shape_is_captured_when_it_is_met_again_and_replayed_from_then_on(
    graphs: StepGraphs,
) -> None:
    body = Body()
    for _ in range(5):
        graphs.run(shape(4), body)
    assert (body.runs, FakeGraph.replays) == (2, 4)
    graphs.run(shape(6), body)
    assert (body.runs, FakeGraph.replays) == (3, 4)


def test_what_is_ignored_is_not_met(graphs: StepGraphs) -> None:
    body = Body()
    with graphs.ignored():
        for _ in range(3):
            graphs.run(shape(4), body)
    assert (body.runs, FakeGraph.replays) == (3, 0)
    graphs.run(shape(4), body)
    assert (body.runs, FakeGraph.replays) == (4, 0)
    with graphs.ignored():
        graphs.run(shape(4), body)
    graphs.run(shape(4), body)
    assert (body.runs, FakeGraph.replays) == (6, 1)


def test_bounds_of_attention_leave_room_for_all_sizes(graphs: StepGraphs) -> None:
    bound, decode = Body(), Body()
    for bounds in range(2, MAX_BOUND_GRAPHS + 4):
        for _ in range(3):
            graphs.run(shape(8, bounds), bound)
    assert FakeGraph.replays == 2 * MAX_BOUND_GRAPHS
    for _ in range(3):
        graphs.run(shape(8), decode)
    assert decode.runs == 2


def test_a_capture_without_memory_says_so_and_the_shape_can_be_captured_later(
    graphs: StepGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = Body()
    graphs.run(shape(4), body)
    monkeypatch.setattr(Body, "is_broken", True)
    with pytest.raises(torch.OutOfMemoryError, match="no room for a graph"):
        graphs.run(shape(4), body)
    monkeypatch.setattr(Body, "is_broken", False)
    graphs.run(shape(4), body)
    assert FakeGraph.replays == 1
