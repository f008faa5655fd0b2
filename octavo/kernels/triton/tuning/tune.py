"""Measures launch shapes on this device: from the heuristic's on, one change at a time.

Called by `octavo tune`. Weights are random, and enough of them that the L2 cache holds no whole
round. Never takes a candidate with other bits than the heuristic's, except for a single token,
where no bits are promised.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from octavo.kernels.triton.experts.grouped import grouped_experts
from octavo.kernels.triton.experts.pairs import experts_of_pairs
from octavo.kernels.triton.experts.stacks import StackedExperts
from octavo.kernels.triton.launching.tickets import make_tickets
from octavo.kernels.triton.product.linear import product
from octavo.kernels.triton.product.matvec import matvec
from octavo.kernels.triton.product.shapes import RowsShape
from octavo.kernels.triton.tuning.shapes import Key, Shape, Shapes, key_of

ROTATED_BYTES, MAX_SETS = 160_000_000, 256
MEASURED_MS = 4.0
SAVED_GAIN = 1.02
"""What is saved beats the heuristic by this factor, both measured anew."""
NEAR = 1e-2
MEASURED, UNFIT, OTHER_BITS = "measured", "do not fit", "have other bits"
LIMITS = {
    "block_p": (16, 128),
    "block_t": (16, 128),
    "block_n": (16, 256),
    "block_k": (32, 512),
    "group": (1, 16),
    "num_warps": (2, 8),
    "num_stages": (2, 6),
}
ROWS_LIMITS = LIMITS | {"block_n": (1, 16), "block_k": (64, 4096)}

Measure = Callable[[Callable[[], object]], float]
"""Returns the microseconds that a call takes on the device."""
Problem = tuple[str, int, tuple[int, ...]]
"""("dense", tokens, (rows, columns)) or ("moe", tokens, (top_k, experts, inner, hidden))."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """A product or a MoE layer of one size, ready to run."""

    key: Key
    shape: Shape
    """The heuristic's."""
    runs: Sequence[Callable[[Shape], Tensor]]
    """The same with other weights."""

    def us(self, shape: Shape, measure: Measure) -> float:
        return measure(lambda: [run(shape) for run in self.runs]) / len(self.runs)

    def is_right(self, found: Tensor, expected: Tensor) -> bool:
        if self.key[0] in ("moe", "product"):
            return torch.equal(found, expected)
        return bool((found - expected).norm() <= NEAR * expected.norm())


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What tuning one problem found."""

    key: Key
    heuristic: Shape
    shape: Shape | None
    """What beats it clearly, and is no slower for the fewest tokens that it would serve."""
    heuristic_us: float
    best_us: float
    fates: Counter[str]
    """How many candidates were MEASURED, or why not."""


class Tuner:
    """Tunes problems of one dtype on one device, one after the other."""

    def __init__(
        self,
        device: str,
        dtype: str,
        *,
        is_deterministic: bool,
        measure: Measure | None,
        num_threads: int,
    ) -> None:
        """`num_threads` build kernels at once; a GPU measures itself without `measure`."""
        self.device = torch.device(device)
        self._like = torch.empty(0, device=self.device, dtype=getattr(torch, dtype))
        self._is_deterministic = is_deterministic
        self._measure = measure or graph_us
        self._num_threads = num_threads
        self._tickets = make_tickets(self.device)
        self._random = torch.Generator(device).manual_seed(0)

    def dense(self, num_tokens: int, rows: int, columns: int) -> Case:
        """Returns the product of a matrix [rows, columns]."""
        weights = self._normal(self._num_sets(rows * columns), rows, columns)
        x = self._normal(num_tokens, columns)

        def run(weight: Tensor, shape: Shape) -> Tensor:
            out = x.new_empty(num_tokens, rows)
            if isinstance(shape, RowsShape):
                matvec(x, weight, None, out, shape)
            else:
                product(x, weight, None, out, shape, self._tickets)
            return out

        shape: Shape = Shapes().product(x, weights[0])
        is_single = num_tokens == 1 and not self._is_deterministic
        if is_single:
            shape = Shapes().rows(x, weights[0])
        elif self._is_deterministic:
            shape = shape.in_one_order()
        return Case(
            key=key_of("rows" if is_single else "product", x.dtype, num_tokens, rows, columns),
            shape=shape,
            runs=[partial(run, weight) for weight in weights],
        )

    def moe(self, num_tokens: int, top_k: int, count: int, inner: int, hidden: int) -> Case:
        """Returns the experts' part of a layer, every expert as likely as any other."""
        num_layers = self._num_sets(3 * count * inner * hidden)
        gate, up = (self._normal(num_layers, count, inner, hidden) for _ in range(2))
        down = self._normal(num_layers, count, hidden, inner)
        layers = [
            StackedExperts(gate_EFM=gate[layer], up_EFM=up[layer], down_EMF=down[layer])
            for layer in range(num_layers)
        ]
        x = self._normal(num_tokens, hidden)
        weights = torch.full_like(x[:, :1], 1 / top_k, dtype=torch.float32).repeat(1, top_k)
        shape = Shapes().experts(x, top_k, layers[0])
        is_of_pairs = shape.is_direct and not self._is_deterministic

        def run(experts: StackedExperts, ids: Tensor, shape: Shape) -> Tensor:
            layer = experts_of_pairs if is_of_pairs else grouped_experts
            return layer(x, weights, ids, experts, "silu", shape)

        return Case(
            key=key_of(
                "pairs" if is_of_pairs else "moe", x.dtype, num_tokens, top_k, count, inner, hidden
            ),
            shape=Shapes().pairs(x, top_k, layers[0]) if is_of_pairs else shape,
            runs=[
                partial(run, layers[at % num_layers], self._routed(num_tokens, top_k, count))
                for at in range(max(4, num_layers))
            ],
        )

    def tune(self, problem: Problem, is_over: Callable[[], bool]) -> Found:
        """Returns what is best of what was met before `is_over`. It serves all numbers of tokens
        from the last power of two to the problem's."""
        kind, num_tokens, sizes = problem
        make = self.moe if kind == "moe" else self.dense
        case = make(num_tokens, *sizes)
        best, fates = self._search(case, is_over)
        before = after = case.us(case.shape, self._measure)
        if best != case.shape:
            after = case.us(best, self._measure)
            before = min(before, case.us(case.shape, self._measure))
        is_kept = before > after * SAVED_GAIN
        if is_kept and num_tokens > 2:
            fewest = make(num_tokens // 2 + 1, *sizes)
            slower, faster = (fewest.us(shape, self._measure) for shape in (best, fewest.shape))
            is_kept = slower <= faster * SAVED_GAIN
        return Found(
            key=case.key,
            heuristic=case.shape,
            shape=best if is_kept else None,
            heuristic_us=before,
            best_us=after,
            fates=fates,
        )

    def _search(self, case: Case, is_over: Callable[[], bool]) -> tuple[Shape, Counter[str]]:
        best, tried, fates = case.shape, {case.shape}, Counter[str]()
        expected = case.runs[0](best)
        least, last = case.us(best, self._measure), None
        while best != last and not is_over():
            last = best
            for part in parts_of(best):
                shapes = [shape for shape in neighbours(best, part) if shape not in tried]
                tried.update(shapes)
                for shape, fate in zip(shapes, self._fates(case, shapes, expected), strict=True):
                    fates[fate] += 1
                    if fate == MEASURED and (us := case.us(shape, self._measure)) < least:
                        best, least = shape, us
                if is_over():
                    break
        return best, fates

    def _fates(self, case: Case, shapes: Sequence[Shape], expected: Tensor) -> list[str]:
        """Returns whether each shape fits the device and gives what is expected."""

        def attempt(shape: Shape) -> Tensor | None:
            try:
                return case.runs[0](shape)
            except (TritonError, RuntimeError):  # the latter from the compiler's passes
                return None

        # Building is most of the time; it leaves Python's lock and calls the assembler.
        with ThreadPoolExecutor(self._num_threads) as pool:
            found = list(pool.map(attempt, shapes))
        return [
            UNFIT if out is None else MEASURED if case.is_right(out, expected) else OTHER_BITS
            for out in found
        ]

    def _normal(self, *sizes: int) -> Tensor:
        values = self._like.new_empty(sizes)
        return values.normal_(std=sizes[-1] ** -0.5, generator=self._random)

    def _routed(self, num_tokens: int, top_k: int, count: int) -> Tensor:
        scores = torch.rand(num_tokens, count, device=self._like.device, generator=self._random)
        return scores.topk(top_k).indices.to(torch.int32).contiguous()

    def _num_sets(self, numbers: int) -> int:
        return min(max(1, ROTATED_BYTES // (numbers * self._like.element_size())), MAX_SETS)


def graph_us(run: Callable[[], object]) -> float:
    """Returns the median time of a call, replayed from a graph."""
    return 1e3 * triton.testing.do_bench_cudagraph(run, rep=MEASURED_MS, return_mode="median")


def parts_of(shape: Shape) -> list[str]:
    """Returns the names of the launches that a shape consists of, and "" for itself."""
    names = [field.name for field in dataclasses.fields(shape)]
    return [*(name for name in names if dataclasses.is_dataclass(getattr(shape, name))), ""]


def neighbours(shape: Shape, part: str) -> Iterator[Shape]:
    """Yields the shapes that differ in one number of one launch: by one stage, or a factor of 2."""
    launch = getattr(shape, part) if part else shape
    limits = ROWS_LIMITS if isinstance(launch, RowsShape) else LIMITS
    for name in (field.name for field in dataclasses.fields(launch) if field.name in limits):
        value, (low, high) = getattr(launch, name), limits[name]
        for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
            if low <= other <= high:
                changed = replace(launch, **{name: other})
                yield replace(shape, **{part: changed}) if part else changed
