"""Decode steps as CUDA graphs: one per batch size in use, recorded when it is met a second time.

Owned by the device runner. A graph replays kernels over fixed addresses, so a step is padded to the
next size and its inputs are copied to where the graph reads them. All graphs share one memory pool:
only one of them runs at a time.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""Beyond the last, multiples of 64. Padding costs next to nothing: padded rows read no expert and
no KV."""


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: Tensor


class DecodeGraphs:
    """Runs the body of a decode step of a given size, captured or not."""

    def __init__(self, max_num_seqs: int, *, is_on: bool) -> None:
        more = range(SIZES[-1] + 64, max_num_seqs + 64, 64)
        self.sizes = [size for size in (*SIZES, *more) if size < max_num_seqs] + [max_num_seqs]
        self._is_on = is_on
        self._pool = torch.cuda.graph_pool_handle() if is_on else None
        self._met: set[int] = set()
        self._captured: dict[int, _Captured] = {}

    def size_of(self, num_rows: int) -> int:
        """Returns how many rows a step of `num_rows` is padded to."""
        return self.sizes[bisect_left(self.sizes, num_rows)]

    def run(self, size: int, body: Callable[[], Tensor]) -> Tensor:
        """Returns what `body` computes from the inputs of this size.

        The first time it runs as it is (which builds its kernels), the second time it is captured;
        the result is valid until the next step of this size.
        """
        found = self._captured.get(size)
        if found is None:
            if not self._is_on or size not in self._met:
                self._met.add(size)
                return body()
            found = self._captured[size] = self._capture(body)
            logger.debug("captured a graph of %d rows", size)
        found.graph.replay()
        return found.output

    def _capture(self, body: Callable[[], Tensor]) -> _Captured:
        # Not torch.cuda.graph(): it collects garbage and empties the cache, which stops the device.
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = body()
        finally:
            graph.capture_end()
        return _Captured(graph, output)
