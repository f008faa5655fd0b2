"""Small steps as CUDA graphs: one for each shape, captured when it is met a second time.

Owned by a device's forward pass. A graph replays kernels over fixed addresses, so a step is padded
to the next shape and its inputs are copied to where the graph reads them. All graphs share one
memory pool: only one of them runs at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_BOUND_GRAPHS = 12
"""Of steps whose attention is bound by more than their numbers; beyond that they are launched
kernel by kernel. A graph takes some MiB of the device; `engine.memory` sets aside room for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What the launches of a padded step depend on."""

    num_rows: int
    num_tokens: int
    is_decode: bool
    """Every row computes one token."""
    bounds: Hashable
    """Of the plan of its attention."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: Tensor


class StepGraphs:
    """Runs the body of a padded step, captured or not."""

    def __init__(self, *, is_on: bool) -> None:
        self._is_on = is_on
        self._is_ignored = False
        self._pool = torch.cuda.graph_pool_handle() if is_on else None
        self._met: set[StepShape] = set()
        self._captured: dict[StepShape, _Captured] = {}

    def run(self, shape: StepShape, body: Callable[[], Tensor]) -> Tensor:
        """Returns what `body` computes from the inputs of this shape.

        The first time it runs as it is (which builds its kernels), the second time it is captured;
        the result is valid until the next step of this shape.
        """
        if self._is_ignored:
            return body()
        found = self._captured.get(shape)
        if found is None:
            if not self._is_on or shape not in self._met or not self._has_room(shape):
                self._met.add(shape)
                return body()
            found = self._captured[shape] = self._capture(body)
            logger.debug("captured a graph of %s", shape)
        found.graph.replay()
        return found.output

    @contextmanager
    def ignored(self) -> Iterator[None]:
        """Steps inside run as they are, and none of their shapes counts as met."""
        self._is_ignored = True
        try:
            yield
        finally:
            self._is_ignored = False

    def _has_room(self, shape: StepShape) -> bool:
        """Of the others there are as many as there are sizes."""
        bound = sum(known.bounds is not None for known in self._captured)
        return shape.bounds is None or bound < MAX_BOUND_GRAPHS

    def _capture(self, body: Callable[[], Tensor]) -> _Captured:
        # Not torch.cuda.graph(): it collects garbage and empties the cache, which stops the device.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = body()
        except BaseException:
            # A broken capture cannot be ended well; what broke it is the news.
            with suppress(RuntimeError):
                graph.capture_end()
            raise
        graph.capture_end()
        return _Captured(graph, output)
