"""Launches of kernels that are built already, without asking Triton's front end again.

Every kernel that the host launches is marked `@launchable`. Triton binds, specialises and looks up
some thirty arguments anew for every launch, in Python; a step of eager launches then waits for the
host. What decides which binary runs is only: the constants, and of every argument its type and what
Triton specialises on (pointers aligned to 16 bytes; integers that are 1, or multiples of 16; of a
tensor descriptor its block and layout). Arguments that change from step to step are marked
`do_not_specialize` at their kernels, so that one binary serves every value: Triton's front end is
asked once for each class of them, and builds nothing.

`building` has kernels built side by side, none of them run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from octavo.observe.progress import UNWATCHED, Progress

try:  # Gluon is experimental: another Triton may not have it there.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
except ImportError:
    LaidOutDescriptor = TensorDescriptor

KNOWN_TRITON = "3.6."
"""How a binary is launched, and Gluon, are Triton's own affair: another version may differ, and is
asked for every launch."""
MAX_TENSOR_MAPS = 1024
_asked: ContextVar[set[tuple[Any, ...]] | None] = ContextVar("asked", default=None)
"""Within `building`: what was asked for already."""
_progress: ContextVar[Progress] = ContextVar("progress", default=UNWATCHED)
_INT32_MAX = 2**31 - 1


class TensorMaps:
    """A binary's descriptors as its launcher takes them: a CUtensorMap each, shape and strides.

    Triton 3.6 encodes them anew for every launch, in a closure around the launcher. Weights and
    pages recur every step, and activations as the allocator hands the same memory out again. No
    memory is held on to: an entry has an address, which means the same whoever lives there.
    """

    def __init__(self, run: Any) -> None:
        """Raises KeyError or AttributeError if the launcher is not as Triton 3.6 makes it."""
        wrapper = inspect.getclosurevars(run.launch)
        self._options = (run.launch_cooperative_grid, run.launch_pdl, None, None)
        self._launch = wrapper.nonlocals["launcher"]
        self._metadata = wrapper.nonlocals["tensordesc_meta"]
        self._encode = wrapper.globals["make_tensordesc_arg"]
        self._encoded: dict[tuple[Any, ...], list[Any]] = {}
        if run.global_scratch_size or run.profile_scratch_size:
            raise AttributeError("the kernel wants scratch memory, which its own launcher allots")

    def run(self, x: int, y: int, z: int, stream: int, function: int, *arguments: Any) -> None:
        """Does what the launcher of a compiled kernel does."""
        flat, number = [], 0
        for argument in arguments:
            if type(argument) in (TensorDescriptor, LaidOutDescriptor):
                flat += self._expanded(argument, number)
                number += 1
            else:
                flat.append(argument)
        self._launch(x, y, z, stream, function, *self._options, *flat)

    def _expanded(self, argument: Any, number: int) -> list[Any]:
        base, shape, strides = argument.base, argument.shape, argument.strides
        key = (number, base.data_ptr(), *shape, *strides, argument.padding)
        found = self._encoded.get(key)
        if found is None:
            if len(self._encoded) >= MAX_TENSOR_MAPS:
                self._encoded.clear()
            found = self._encode(argument, self._metadata[number])
            self._encoded[key] = found
        return found


class Launchable:
    """A jitted function, launched as ever: kernel[grid](*arguments, **constants_and_options).

    Arguments that are no constants are positional. Remembers the binaries it has launched, as
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
            else:
                key.append(kind)
                values.append(argument)
        key.append(device)
        if (asked := _asked.get()) is not None:
            if (wanted := (self, *key)) not in asked:
                asked.add(wanted)
                self._function.run(*arguments, grid=grid, warmup=True, **constants)
            return
        built = self._built.get(found := tuple(key))
        if built is None:
            with _progress.get().building():
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
    if not triton.__version__.startswith(KNOWN_TRITON):
        return None
    if not has_maps:
        return run
    try:
        return TensorMaps(run).run
    except (AttributeError, KeyError):
        return None


def can_build() -> bool:
    """Whether `building` is possible here: the interpreter builds nothing, and another Triton may
    do it in another way."""
    return triton.__version__.startswith(KNOWN_TRITON) and not triton.knobs.runtime.interpret


@contextmanager
def building(num_threads: int) -> Iterator[None]:
    """Has launches made inside build their kernels, on `num_threads` threads, and run none: what
    they would have written stays as it was. Ends when all are built.

    Most of a build is not Python, so that threads suffice. What cannot be built is asked for again
    by the launch that needs it, which then raises.
    """
    assert can_build()
    token = _asked.set(set())
    try:
        with (
            ThreadPoolExecutor(num_threads) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            yield
    finally:
        _asked.reset(token)


def is_building() -> bool:
    """Whether this is within `building`."""
    return _asked.get() is not None


def tell_builds(progress: Progress) -> None:
    """From now on `progress` is told of launches in this thread that may have to build first."""
    _progress.set(progress)


def launchable(function: Any) -> Launchable:
    """Marks a jitted function as one that the host launches."""
    return Launchable(function)


def _int_class(value: int) -> int:
    """What Triton builds different binaries for."""
    size = 4 if -_INT32_MAX <= value <= _INT32_MAX else 8
    return size + (1 if value == 1 else 2 if value % 16 == 0 else 0)


@lru_cache
def num_processors(device: torch.device) -> int:
    """Returns the multiprocessors of a GPU; for the interpreter, as many as an H100 has."""
    if device.type == "cpu" or triton.knobs.runtime.interpret:
        return 132
    utils = triton.runtime.driver.active.utils
    return utils.get_device_properties(device.index or 0)["multiprocessor_count"]


def cdiv(count: int, size: int) -> int:
    """Returns how many blocks of `size` hold `count`. Triton's own takes 5 us on the host."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """Returns the least power of two that is at least `count`, which is at least 1."""
    return 1 << (count - 1).bit_length()
