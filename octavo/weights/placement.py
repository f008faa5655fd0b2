"""Puts weights where the ops want them: views on the host, copies in stacks on a device.

Made by the runner's builder, asked by `models.decoder`. Never knows a model: which matrices belong
together and how ranks share them are arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from threading import Lock
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.formats import WeightFormat
from octavo.kernels.dequantize import gguf_table
from octavo.kernels.limits import check_copied_format
from octavo.kernels.planes import empty_planes
from octavo.kernels.weights import Stack, Weight
from octavo.planes import PlaneLayout
from octavo.weights.source import NUMBER_DTYPES, TensorSource, half_split_rows
from octavo.weights.split import Split
from octavo.weights.staging import Staging

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

    def stack(self, splits: Mapping[str, Split | None]) -> Sequence[Weight]:
        """Returns the named matrices, of one shape and format, as `matrices` does; a device has
        them as one `Stack`."""
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
        for name in splits:
            if self._source.order(name) is not None:
                raise UnsupportedModelError(
                    f"{name} has columns whose groups are out of order (desc_act), which "
                    f"{self.device} cannot multiply by yet; unpack the model with --dtype bfloat16"
                )
        weights = {name: self._source.matrix(name) for name in splits}
        return tuple(
            replace(weight, data=_ordered(weight.data, splits[name]))
            for name, weight in weights.items()
        )

    def stack(self, splits: Mapping[str, Split | None]) -> Sequence[Weight]:
        return self.matrices(splits)

    def vector(self, name: str, split: Split | None = None) -> Tensor:
        return _ordered(self._source.vector(name), split)

    def finish(self) -> None:
        """Nothing to wait for."""


class _Copy(NamedTuple):
    """The part of a matrix from [row, first of cols] on that fills `out`."""

    name: str
    row: int
    cols: range
    out: Weight
    split: Split | None


class DevicePlacement:
    """Matrices are copied to a device: laid out as they are asked for, filled by `finish`.

    So a format that cannot be placed, or too little memory, shows before anything is read.
    """

    def __init__(
        self,
        source: TensorSource,
        device: torch.device,
        rank: int = 0,
        size: int = 1,
        *,
        keeps_packed: bool = True,
    ) -> None:
        """`keeps_packed`: whether packed matrices may become planes; else they are refused."""
        self.device = device
        self._keeps_packed = keeps_packed
        self._source = source
        self._rank = rank
        self._size = size
        self._copies: list[_Copy] = []
        self._tables: dict[str, Tensor | None] = {}
        self._converting = Lock()

    def matrices(self, splits: Mapping[str, Split | None]) -> tuple[Weight, ...]:
        placed: list[Weight] = []
        for alike in self._alike(splits, self._kind):
            rows = [len(self._range(name, "rows", split)) for name, split in alike.items()]
            order, whole = self._source.order(next(iter(alike))), self._placed(alike)
            if order is not None:
                whole = replace(whole, order=order.to(self.device))
            placed += whole.parts(rows)
        return tuple(placed)

    def stack(self, splits: Mapping[str, Split | None]) -> Sequence[Weight]:
        runs = list(self._alike(splits, self._format_name))
        if len(runs) > 1:
            first, other = (next(iter(run)) for run in runs[:2])
            raise UnsupportedModelError(
                f"{first} is in {self._format_name(first)} but {other} in "
                f"{self._format_name(other)}, and {self.device} multiplies both at once; choose "
                "one with --dtype bfloat16"
            )
        whole = self._placed(splits)
        return Stack(whole=whole, num_matrices=len(splits), order_EK=self._orders(splits))

    def _orders(self, names: Iterable[str]) -> Tensor | None:
        """Returns the orders of some matrices one below the other, None if they have none."""
        orders = {name: self._source.order(name) for name in names}
        if all(order is None for order in orders.values()):
            return None
        whole = (
            torch.arange(self._source.shape(name)[1], dtype=torch.int32) if one is None else one
            for name, one in orders.items()
        )
        return torch.stack(list(whole)).to(self.device)

    def _alike(
        self, splits: Mapping[str, Split | None], kind: Callable[[str], object]
    ) -> Iterator[dict[str, Split | None]]:
        """Yields the matrices in runs of one kind."""
        for _, run in groupby(splits.items(), lambda item: kind(item[0])):
            yield dict(run)

    def _kind(self, name: str) -> tuple[str, bytes]:
        """Returns what matrices share that lie in one tensor: format and order."""
        order = self._source.order(name)
        return self._format_name(name), b"" if order is None else order.numpy().tobytes()

    def _format_name(self, name: str) -> str:
        layout = self._layout(name)
        return self._format(name).name if layout is None else layout.name

    def _format(self, name: str) -> WeightFormat:
        source = self._source
        return source.device_format(name) if self._keeps_packed else source.format(name)

    def _layout(self, name: str) -> PlaneLayout | None:
        return self._source.layout(name) if self._keeps_packed else None

    def _placed(self, splits: Mapping[str, Split | None]) -> Weight:
        """Returns matrices of one format as one, which `finish` fills."""
        first = next(iter(splits))
        number_format, layout = self._format(first), self._layout(first)
        if layout is None:
            device = str(self.device)
            check_copied_format(first, number_format, device, keeps_packed=self._keeps_packed)
        rows = [self._range(name, "rows", split) for name, split in splits.items()]
        cols = [self._range(name, "cols", split) for name, split in splits.items()]
        shape = sum(len(one) for one in rows), len(cols[0])
        planes = None
        if layout is None and number_format.is_block:
            block = number_format.block_size
            self._check_steps(first, number_format.name, block, cols[0], splits[first])
            width = number_format.row_bytes(shape[1])
            data = torch.empty((shape[0], width), dtype=torch.uint8, device=self.device)
        elif layout is None:
            dtype = NUMBER_DTYPES[number_format.name]
            data = torch.empty(shape, dtype=dtype, device=self.device)
        else:
            self._check_borders(first, layout, cols[0], splits[first])
            planes = empty_planes(layout, *shape, self.device)
            data = planes.codes
        whole = Weight(
            data=data,
            format=number_format,
            rows=shape[0],
            cols=shape[1],
            table=self._table(number_format) if layout is None else None,
            planes=planes,
            layout=layout,
        )
        start = 0
        for name, row, col in zip(splits, rows, cols, strict=True):
            part = whole.part(start, start + len(row))
            self._copies.append(_Copy(name, row.start, col, part, splits[name]))
            start += len(row)
        return whole

    def _table(self, form: WeightFormat) -> Tensor | None:
        """Returns the table of a format on the device, one for all matrices."""
        if form.name not in self._tables:
            table = gguf_table(form)
            self._tables[form.name] = None if table is None else table.to(self.device)
        return self._tables[form.name]

    def _check_borders(
        self, name: str, layout: PlaneLayout, cols: range, split: Split | None
    ) -> None:
        """Raises ConfigError if a rank's columns do not begin and end with whole groups, or are not
        those of x that it has."""
        if len(cols) < self._source.shape(name)[1] and self._source.order(name) is not None:
            raise ConfigError(
                f"tensor_parallel_size {self._size} cuts the columns of {name}, whose groups are "
                "out of order (desc_act); use 1, or --dtype bfloat16",
                field="tensor_parallel_size",
            )
        self._check_steps(name, layout.name, layout.step, cols, split)

    def _check_steps(
        self, name: str, form: str, step: int, cols: range, split: Split | None
    ) -> None:
        whole = self._source.shape(name)[1]
        if cols.start % step or (cols.stop % step and cols.stop != whole):
            assert split is not None
            fitting = (
                str(size)
                for size in range(1, 2 * self._size)
                if split.num_units % size == 0 and (size == 1 or not whole % (size * step))
            )
            raise ConfigError(
                f"tensor_parallel_size {self._size} cuts the {whole} columns of {name} within a "
                f"group of {step} that {form} keeps together; use "
                f"{' or '.join(fitting)}, or --dtype bfloat16",
                field="tensor_parallel_size",
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
        staging = Staging(self.device, self._converting)
        try:
            for name, row, cols, out, split in copies:
                if out.planes is None:
                    self._source.copy_into(name, out.data, staging, row, cols.start)
                else:
                    self._source.copy_planes(name, out.planes, staging, row, cols)
                if split is not None and split.pairs is not None:
                    for plane in out.planes or (out.data,):
                        plane.copy_(_ordered(plane, split))
        except BaseException:
            for _ in copies:  # so that the other workers stop
                pass
            raise

    def _range(self, name: str, axis: Literal["rows", "cols"], split: Split | None) -> range:
        length = self._source.shape(name)[axis == "cols"]
        if split is None or split.axis != axis:
            return range(length)
        index, count = split.part(self._rank, self._size)
        return range(index * length // count, (index + 1) * length // count)
