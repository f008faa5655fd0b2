"""Which keys a query sees: `octavo.visibility` on the device.

Device functions of every attention kernel and planner; they launch nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL, WINDOW, CHUNK = 0, 1, 2
"""Values of the kernels' VISIBLE; `reach` is the size of a window or chunk."""


@triton.jit
def first_visible(position, reach, VISIBLE: tl.constexpr):
    """Returns the first position that the query at `position` sees; never less for later ones."""
    first = position * 0
    if VISIBLE == 1:
        first = tl.maximum(position - reach + 1, 0)
    if VISIBLE == 2:
        first = position // reach * reach
    return first
