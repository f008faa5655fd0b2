"""What kernels of `gluon_cpu.py` hold: torch's tensors, and addresses as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

TORCH = {
    tl.int1: torch.bool,
    tl.int8: torch.int8,
    tl.uint8: torch.uint8,
    tl.int16: torch.int16,
    tl.uint16: torch.uint16,
    tl.int32: torch.int32,
    tl.int64: torch.int64,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float32: torch.float32,
}
TRITON = {one: other for other, one in TORCH.items()}


class Value:
    """A tensor in registers; or addresses, of numbers of `element`."""

    def __init__(self, data: Tensor, element: tl.dtype | None = None) -> None:
        self.data, self.element = data, element

    @property
    def dtype(self) -> Any:
        return TRITON[self.data.dtype] if self.element is None else tl.pointer_type(self.element)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=SimpleNamespace(parent=None))

    def to(self, dtype: tl.dtype, bitcast: bool = False) -> Value:
        if isinstance(dtype, tl.pointer_type):
            return Value(self.data, dtype.element_ty)
        kind = TORCH[dtype]
        return Value(self.data.view(kind) if bitcast else self.data.to(kind))

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.data.reshape(shape), self.element)

    def permute(self, order: tuple[int, ...]) -> Value:
        return Value(self.data.permute(order), self.element)

    def expand_dims(self, axis: int) -> Value:
        return Value(self.data.unsqueeze(axis), self.element)

    def broadcast_to(self, shape: list[int]) -> Value:
        return Value(self.data.broadcast_to(shape), self.element)

    def __getitem__(self, place: Any) -> Value:
        return Value(self.data[place], self.element)

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)

    def _with(self, other: Any, make: Callable[[Any, Any], Any]) -> Value:
        theirs = other.data if isinstance(other, Value) else other
        if self.element is not None:
            size = TORCH[self.element].itemsize
            return Value(self.data + theirs * size, self.element)
        return Value(make(self.data, theirs))

    def __add__(self, other: Any) -> Value:
        if isinstance(other, Value) and other.element is not None:
            return other + self
        return self._with(other, lambda a, b: a + b)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a - b)

    def __rsub__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b - a)

    def __mul__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a * b)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a / b)

    def __neg__(self) -> Value:
        return Value(-self.data)

    def __floordiv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a // b)

    def __rfloordiv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b // a)

    def __mod__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a % b)

    def __rmod__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b % a)

    def __rtruediv__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: b / a)

    def __xor__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a ^ b)

    def __and__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a & b)

    __rand__ = __and__

    def __or__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a | b)

    def __rshift__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a >> b)

    def __lshift__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a << b)

    def __lt__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a < b)

    def __gt__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a > b)

    def __le__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a <= b)

    def __ge__(self, other: Any) -> Value:
        return self._with(other, lambda a, b: a >= b)

    def __eq__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a == b)

    def __ne__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: a != b)

    __hash__ = None  # type: ignore[assignment]


class Shared:
    """Shared memory, whose tiles are views."""

    layout = None

    def __init__(self, data: Tensor) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> tl.dtype:
        return TRITON[self.data.dtype]

    def index(self, place: Any) -> Shared:
        return Shared(self.data[int(place)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, layout: object) -> Value:
        return Value(self.data.clone())

    def store(self, value: Value) -> None:
        self.data.copy_(value.data)

    def _reinterpret(self, dtype: tl.dtype, shape: list[int], layout: object) -> Shared | Boxes:
        """Returns a tile [rows, columns] as Hopper's copies and products have it in memory: boxes
        of `shape`, those of the same columns side by side. Tiles whose columns stay whole lie there
        as they are, in boxes of fewer rows."""
        if len(self.shape) == len(shape):
            return Shared(self.data.view(shape))
        return Boxes(self, shape[1:])


@dataclass(frozen=True, slots=True)
class Boxes:
    whole: Shared
    shape: list[int]

    def index(self, place: Any) -> Shared:
        rows, columns = self.shape[-2:]
        across = self.whole.shape[0] // rows
        down, right = int(place) % across * rows, int(place) // across * columns
        return Shared(self.whole.data[down : down + rows, right : right + columns].view(self.shape))


@dataclass(slots=True)
class Machine:
    """What runs: its memory, the program, and the copies that are on their way."""

    is_late: bool = False
    num_warps: int = 4
    program: tuple[int, ...] = (0, 0, 0)
    grid: tuple[int, ...] = (1, 1, 1)
    tensors: dict[int, Tensor] = field(default_factory=dict)
    open: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)

    def _memory(self, addresses: Value) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields memory as numbers, the places in it of addresses, and which are there."""
        assert addresses.element is not None
        dtype = TORCH[addresses.element]
        for start, tensor in self.tensors.items():
            flat = torch.empty(0, dtype=dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
            is_here = (addresses.data >= start) & (
                addresses.data < start + flat.numel() * dtype.itemsize
            )
            yield flat, (addresses.data - start) // dtype.itemsize, is_here

    def load(self, at: Value, mask: Tensor, other: float = 0) -> Tensor:
        assert at.element is not None
        dtype = TORCH[at.element]
        shape = torch.broadcast_shapes(at.data.shape, mask.shape)
        out, left = torch.full(shape, float(other)).to(dtype), mask.expand(shape).clone()
        for flat, place, is_here in self._memory(Value(at.data.expand(shape), at.element)):
            wanted = left & is_here
            out[wanted] = flat[place[wanted]]
            left &= ~is_here
        assert not left.any(), "a load from where no tensor is"
        return out

    def store(self, at: Value, value: Tensor, mask: Tensor) -> None:
        shape = torch.broadcast_shapes(at.data.shape, mask.shape, value.shape)
        at = Value(at.data.expand(shape), at.element)
        left, value = mask.expand(shape).clone(), value.expand(shape)
        for flat, place, is_here in self._memory(at):
            wanted = left & is_here
            as_bytes = torch.uint8 if flat.dtype == torch.float8_e4m3fn else flat.dtype
            flat.view(as_bytes)[place[wanted]] = value[wanted].to(flat.dtype).view(as_bytes)
            left &= ~is_here
        assert not left.any(), "a store to where no tensor is"

    def copy(self, to: Shared, at: Value, mask: Tensor) -> None:
        def now() -> None:
            to.data.copy_(self.load(at, mask.expand(torch.broadcast_shapes(mask.shape, at.shape))))

        self.open.append(now)
        if not self.is_late:
            now()

    def wait(self, left: int) -> None:
        while len(self.groups) > left:
            for copy in self.groups.pop(0):
                if self.is_late:
                    copy()

    def pointer(self, argument: Any) -> Any:
        """Returns an argument of a launch as a kernel sees it."""
        if isinstance(argument, tuple):
            return tuple(self.pointer(one) for one in argument)
        if not isinstance(argument, int | Tensor):
            return argument
        if not isinstance(argument, Tensor):
            return whole(argument)
        self.tensors[argument.untyped_storage().data_ptr()] = argument
        return Value(torch.tensor(argument.data_ptr()), TRITON[argument.dtype])


def whole(number: int) -> Value:
    return Value(torch.tensor(number, dtype=torch.int32))


def data_of(value: Any) -> Any:
    return value.data if isinstance(value, Value) else value


def mask_of(mask: Any) -> Tensor:
    return torch.tensor(True) if mask is None else torch.as_tensor(data_of(mask))
