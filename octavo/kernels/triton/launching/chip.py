"""What launches ask of the GPU and of its Triton, and the small arithmetic of their grids.

Asked by every launcher. Never launches anything.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton

KNOWN_TRITON = "3.6."
"""How a binary is launched, and Gluon, are Triton's own affair: another version may differ, and is
asked for every launch."""


def is_known_triton() -> bool:
    """Whether this is the Triton whose insides are known here."""
    return triton.__version__.startswith(KNOWN_TRITON)


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether `device` has Hopper's early launches and tensor memory engine (or is later)."""
    if device.type == "cpu" or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


@lru_cache
def has_wgmma(device: torch.device) -> bool:
    """Whether `device` is Hopper itself: its successors have other products."""
    return is_hopper(device) and triton.runtime.driver.active.get_current_target().arch == 90


def can_describe(x: torch.Tensor) -> bool:
    """Whether Hopper's tensor memory engine can be told where the rows of `x` [..., columns] lie,
    and those of what has as many columns: all begin at a multiple of 16 bytes."""
    strides = (stride * x.element_size() for stride in x.stride()[:-1])
    return x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in strides)


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
