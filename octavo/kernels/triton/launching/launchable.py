"""Launches of kernels that are built already, without asking Triton's front end again.

Every kernel that the host launches is marked `@launchable`. Triton binds, specialises and looks up
some thirty arguments anew for every launch, in Python; a step of eager launches then waits for the
host. What decides which binary runs is only: the constants, and of every argument its type and what
Triton specialises on (pointers aligned to 16 bytes; integers that are 1, or multiples of 16; of a
tensor descriptor its block and layout). Arguments that change from step to step are marked
`do_not_specialize` at their kernels, so that one binary serves every value: Triton's front end is
asked once for each class of them, and builds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.kernels.triton.launching.building import asked, watching
from octavo.kernels.triton.launching.chip import is_known_triton
from octavo.kernels.triton.launching.tensor_maps import LaidOutDescriptor, TensorMaps

_INT32_MAX = 2**31 - 1


class Launchable:
    """A jitted function, launched as ever: kernel[grid](*arguments, **constants_and_options).

    Arguments that are no constants are positional: numbers, tensors, descriptors of tensors, or
    tuples of tensors and numbers, a tensor first. Remembers the binaries it has launched, as
    Triton does.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._built: dict[tuple[Any, ...], tuple[Any, Any, list[str]]] = {}

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
        device, has_maps = -1, False
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
            elif kind is TensorDescriptor or kind is LaidOutDescriptor:
                layout = None if kind is TensorDescriptor else argument.layout
                key.append((kind, argument.base.dtype, *argument.block_shape, layout))
                values.append(argument)
                device = argument.base.get_device()
                has_maps = True
            elif kind is tuple:
                parts, classes = _parts(argument)
                key += classes
                values.append(parts)
                device = argument[0].get_device()
            else:
                key.append(kind)
                values.append(argument)
        key.append(device)
        if (known := asked.get()) is not None:
            if (wanted := (self, *key)) not in known:
                known.add(wanted)
                self._function.run(*arguments, grid=grid, warmup=True, **constants)
            return
        built = self._built.get(found := tuple(key))
        if built is None:
            with watching.get().building():
                kernel = self._function[grid](*arguments, **constants)
            # The interpreter builds nothing.
            run = None if kernel is None or device < 0 else _runner(kernel.run, has_maps)
            if run is not None:
                self._built[found] = kernel, run, self._function.arg_names[len(arguments) :]
            return
        kernel, run, names = built
        run(
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


def _runner(run: Any, has_maps: bool) -> Callable[..., None] | None:
    """Returns what launches a binary; None if only Triton's front end knows how to."""
    if not is_known_triton():
        return None
    if not has_maps:
        return run
    try:
        return TensorMaps(run).run
    except (AttributeError, KeyError):
        return None


def launchable(function: Any) -> Launchable:
    """Marks a jitted function as one that the host launches."""
    return Launchable(function)


def _parts(argument: tuple[Tensor | int, ...]) -> tuple[tuple[int, ...], list[Any]]:
    """Returns the values of a tuple, and what Triton builds different binaries for."""
    values = tuple([one if type(one) is int else one.data_ptr() for one in argument])
    classes = [
        _int_class(value) if type(one) is int else (one.dtype, value & 15 == 0)
        for one, value in zip(argument, values, strict=True)
    ]
    return values, classes


def _int_class(value: int) -> int:
    """What Triton builds different binaries for."""
    size = 4 if -_INT32_MAX <= value <= _INT32_MAX else 8
    return size + (1 if value == 1 else 2 if value % 16 == 0 else 0)
