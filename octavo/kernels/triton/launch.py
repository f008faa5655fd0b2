"""Launches of kernels that are built already, without asking Triton's front end again.

Every kernel that the host launches is marked `@launchable`. Triton binds, specialises and looks up
some thirty arguments anew for every launch, in Python; a step of eager launches then waits for the
host. What decides which binary runs is only: the constants, and of every argument its type and what
Triton specialises on (pointers aligned to 16 bytes; integers that are 1, or multiples of 16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_INT32_MAX = 2**31 - 1


class Launchable:
    """A jitted function, launched as ever: kernel[grid](*arguments, **constants_and_options).

    Arguments that are no constants are positional. Remembers the binaries it has launched, as
    Triton does.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._built: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self._launch(grid, arguments, constants)

        return launch

    def _launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        values: list[Any] = []
        key: list[Any] = [*constants.values()]
        device = -1
        for argument in arguments:
            kind = type(argument)
            if kind is int:
                key.append(_int_class(argument))
                values.append(argument)
            elif kind is Tensor:
                pointer = argument.data_ptr()
                key.append((argument.dtype, pointer & 15 == 0))
                values.append(pointer)
                device = argument.get_device()
            elif kind is TensorDescriptor:
                self._function[grid](*arguments, **constants)
                return
            else:
                key.append(kind)
                values.append(argument)
        key.append(device)
        built = self._built.get(found := tuple(key))
        if built is None:
            kernel = self._function[grid](*arguments, **constants)
            if kernel is not None and device >= 0:  # the interpreter builds nothing
                self._built[found] = kernel, self._function.arg_names[len(arguments) :]
            return
        kernel, names = built
        kernel.run(
            *(*grid, 1, 1)[:3],
            torch._C._cuda_getCurrentRawStream(device),
            kernel.function,
            kernel.packed_metadata,
            None,
            None,
            None,
            *values,
            *[constants[name] for name in names],
        )


def launchable(function: Any) -> Launchable:
    """Marks a jitted function as one that the host launches."""
    return Launchable(function)


def _int_class(value: int) -> int:
    """What Triton builds different binaries for."""
    size = 4 if -_INT32_MAX <= value <= _INT32_MAX else 8
    return size + (1 if value == 1 else 2 if value % 16 == 0 else 0)


def cdiv(count: int, size: int) -> int:
    """Returns how many blocks of `size` hold `count`. Triton's own takes 5 us on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Returns the least power of two that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()
