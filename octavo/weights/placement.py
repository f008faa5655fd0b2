"""Puts weights where the ops want them: views on the host, copies in stacks on a device.

Made by the runner's builder, asked by `models.decoder`. Never knows a model: which matrices belong
together and how ranks share them are arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.errors import UnsupportedModelError
from octavo.formats import WeightFormat
from octavo.kernels.limits import check_copied_format
from octavo.kernels.weights import Weight
from octavo.weights.source import NUMBER_DTYPES, Staging, TensorSource, half_split_rows
from octavo.weights.split import Split

_NUM_WORKERS = 8
"""Threads that read and copy; enough to keep a PCIe link busy from the page cache."""


class Placement(Protocol):
    """Where the tensors of a source go."""

    device: torch.device

    def matrices(self, splits: Mapping[str, Split | None]) -> tuple[Weight, ...]:
        """Returns the named matrices in order, None for those that every rank has whole, with their
        rows in the order that we compute in (`Split.pairs`).

        A device has them one after the other in one tensor, so that one product serves q, k and v
        and the experts of a layer are one [E, rows, cols] stack. Their numbers may not be there
        before `finish`. Raises ConfigError, UnsupportedModelError or WeightsError.
        """
        ...

    def vector(self, name: str, split: Split | None = None) -> Tensor:
        """Returns a 1-D float32 tensor, or this rank's part of it."""
        ...

    def finish(self) -> None:
        """Returns when every number has arrived. Raises WeightsError."""
        ...


def _ordered(data: Tensor, split: Split | None) -> Tensor:
    """Returns whole heads of a matrix or vector with their rows in the order of our kernels."""
    if split is None or split.pairs is None:
        return data
    rows, pairs = data.view(len(data), -1), split.pairs
    return half_split_rows(rows, len(rows) // pairs.head_size, pairs.first).view(data.shape)


class HostPlacement:
    """Matrices stay where the source has them, mapped files in their files. One rank alone."""

    device = torch.device("cpu")

    def __init__(self, source: TensorSource) -> None:
        self._source = source

    def matrices(self, splits: Mapping[str, Split | None]) -> tuple[Weight, ...]:
        weights = {name: self._source.matrix(name) for name in splits}
        return tuple(
            replace(weight, data=_ordered(weight.data, splits[name]))
            for name, weight in weights.items()
        )

    def vector(self, name: str, split: Split | None = None) -> Tensor:
        return _ordered(self._source.vector(name), split)

    def finish(self) -> None:
        """Nothing to wait for."""


class _Copy(NamedTuple):
    """The part of a matrix from [row, col] on that fills `out`."""

    name: str
    row: int
    col: int
    out: Tensor
    split: Split | None


class DevicePlacement:
    """Matrices are copied to a device: laid out as they are asked for, filled by `finish`.

    So a format that cannot be placed, or too little memory, shows before anything is read.
    """

    def __init__(
        self, source: TensorSource, device: torch.device, rank: int = 0, size: int = 1
    ) -> None:
        self.device = device
        self._source = source
        self._rank = rank
        self._size = size
        self._copies: list[_Copy] = []

    def matrices(self, splits: Mapping[str, Split | None]) -> tuple[Weight, ...]:
        number_format = self._common_format(splits)
        rows = [self._range(name, "rows", split) for name, split in splits.items()]
        cols = [self._range(name, "cols", split) for name, split in splits.items()]
        stack = torch.empty(
            (sum(len(one) for one in rows), len(cols[0])),
            dtype=NUMBER_DTYPES[number_format.name],
            device=self.device,
        )
        parts = stack.split([len(one) for one in rows])
        self._copies += [
            _Copy(name, row.start, col.start, part, splits[name])
            for name, row, col, part in zip(splits, rows, cols, parts, strict=True)
        ]
        return tuple(
            Weight(data=part, format=number_format, rows=part.shape[0], cols=part.shape[1])
            for part in parts
        )

    def vector(self, name: str, split: Split | None = None) -> Tensor:
        vector = self._source.vector(name)
        if split is not None:
            index, count = split.part(self._rank, self._size)
            vector = vector.view(count, -1)[index]
        return _ordered(vector, split).to(self.device)

    def finish(self) -> None:
        copies, self._copies = iter(self._copies), []
        with ThreadPoolExecutor(_NUM_WORKERS) as pool:
            workers = [pool.submit(self._work, copies) for _ in range(_NUM_WORKERS)]
        for worker in workers:
            worker.result()
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)  # sync: the copies of all workers

    @torch.inference_mode()
    def _work(self, copies: Iterator[_Copy]) -> None:
        """Makes those copies that no other worker takes; taking from a list is atomic."""
        staging = Staging(self.device)
        try:
            for name, row, col, out, split in copies:
                self._source.copy_into(name, out, staging, row, col)
                if split is not None and split.pairs is not None:
                    out.copy_(_ordered(out, split))
        except BaseException:
            for _ in copies:  # so that the other workers stop
                pass
            raise

    def _common_format(self, names: Iterable[str]) -> WeightFormat:
        first, *others = names
        found = self._source.format(first)
        for name in others:
            if self._source.format(name) != found:
                raise UnsupportedModelError(
                    f"{first} is in {found.name} but {name} in {self._source.format(name).name}, "
                    f"and {self.device} multiplies both at once; choose one with --dtype bfloat16"
                )
        check_copied_format(first, found, str(self.device))
        return found

    def _range(self, name: str, axis: Literal["rows", "cols"], split: Split | None) -> range:
        length = self._source.shape(name)[axis == "cols"]
        if split is None or split.axis != axis:
            return range(length)
        index, count = split.part(self._rank, self._size)
        return range(index * length // count, (index + 1) * length // count)
