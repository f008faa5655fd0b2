"""Early launch: on Hopper and later a kernel is set up while the one before it ends.

Used by every kernel of a step and its launcher. Never decides what a kernel computes.

A kernel's turn comes when the one before it has ended. Its programs may be there earlier: once all
programs of the one before have ended, or announced it, which they do only when their own turn has
come. So before its turn a program may read weights, and what kernels before the last one wrote; it
writes nothing, since the allocator hands on buffers that the last one may still use; and it does
not leave, or the chain would break: a kernel waits for the one before it alone.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.kernels.triton.launching.chip import is_hopper


@triton.jit
def wait_turn(OVERLAP: tl.constexpr):
    """Returns when all kernels before this one have ended and what they wrote can be seen."""
    if OVERLAP:
        gdc_wait()


@triton.jit
def announce(OVERLAP: tl.constexpr):
    """Lets the next kernel's programs come, where there is room beside those of this one.

    Called past the turn, by light kernels and where the next has something to do before its turn
    (H100: 2.3 us of a lone token's layer of Qwen3, 0.8 of one of 32). Dense products do not: those
    that come crowd on the processors that are free first (a lone token's qkv: 2 us slower).
    """
    if OVERLAP:
        gdc_launch_dependents()


@lru_cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Returns the keyword arguments of a launch whose kernel has OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if is_hopper(device) else {"OVERLAP": False}
