"""Early launch: on Hopper and later a kernel is set up while the one before it ends.

Used by every kernel of a step and its launcher. Never decides what a kernel computes.

A kernel waits for the one before it alone, so the chain is safe only if every program of every
kernel waits before it leaves, before it reads what any kernel writes (also positions and block
tables) and before it writes at all: the allocator hands buffers on that earlier kernels still
use. Weights are written by no kernel and may be read before.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def wait_turn(OVERLAP: tl.constexpr):
    """Returns when all kernels before this one have ended and what they wrote can be seen.

    Nobody announces the next kernel before its own end. All doing so cost a step of Qwen3-30B-A3B
    10 %: programs that wait crowd on the processors that are free first. Light kernels doing so
    once their turn had come gained nothing (a token 3.13 to 3.20 ms, without 3.12; H100).
    """
    if OVERLAP:
        gdc_wait()


@lru_cache
def is_hopper(device: torch.device) -> bool:
    """Whether `device` has Hopper's early launches and tensor memory engine (or is later)."""
    if device.type == "cpu" or triton.knobs.runtime.interpret:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and int(target.arch) >= 90


@lru_cache
def launch_options(device: torch.device) -> dict[str, bool]:
    """Returns the keyword arguments of a launch whose kernel has OVERLAP."""
    return {"OVERLAP": True, "launch_pdl": True} if is_hopper(device) else {"OVERLAP": False}
