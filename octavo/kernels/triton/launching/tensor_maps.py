"""The descriptors of a launch, encoded once for each tensor and not for each launch.

Used by `launchable.py`, with Triton 3.6 alone.
"""

from __future__ import annotations

import inspect
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

try:  # Gluon is experimental: another Triton may not have it there.
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor
except ImportError:
    LaidOutDescriptor = TensorDescriptor

MAX_TENSOR_MAPS = 1024


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
