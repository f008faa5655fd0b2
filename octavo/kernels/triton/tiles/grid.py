"""Which tile of a product a program computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of_program(num_rows, num_columns, GROUP: tl.constexpr):
    """The (row block, column block) of this program: GROUP row blocks share each column block."""
    program = tl.program_id(0)
    per_group = GROUP * num_columns
    first = program // per_group * GROUP
    height = tl.minimum(num_rows - first, GROUP)
    return first + program % per_group % height, program % per_group // height
