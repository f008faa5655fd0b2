"""Random rows of blocks that mean small numbers: dummy weights on a CPU, and tests.

Never makes the numbers that they stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from octavo.formats import WeightFormat
from octavo.kernels.dequantize import gguf_table
from octavo.kernels.weights import Weight

_HALVES = {
    **dict.fromkeys(("q8_0", "q4_0", "q5_0", "iq4_nl", "iq4_xs"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
    **{"q6_k": (208,), "q2_k": (80, 82), "q3_k": (108,)},
}
"""Where blocks have factors in float16."""
_LARGEST = {
    **{"q8_0": 128, "q4_0": 8, "q4_1": 16, "q5_0": 16, "q5_1": 32, "iq4_nl": 127, "q2_k": 45},
    **{"q3_k": 128, "q4_k": 945, "q5_k": 1953, "q6_k": 4096, "iq4_xs": 4064},
}
"""Of the numbers that factors multiply."""
_E4M3_BELOW_2 = 0xBF


def random_weight(
    form: WeightFormat, rows: int, cols: int, bound: float, generator: torch.Generator
) -> Weight:
    """Returns a matrix whose values lie in +-bound or nearly so (for nvfp4 and fp8: of its order).
    Raises ConfigError where blocks do not divide its columns."""
    size = rows, form.row_bytes(cols)
    data = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    blocks = data.view(rows, -1, form.block_bytes)
    if form.name == "fp8":
        blocks[..., :4] = _bytes(blocks, bound / 2, torch.float32, generator)
        blocks[..., 4:] &= _E4M3_BELOW_2
    elif form.name == "mxfp4":
        blocks[..., 0] = 127 + round(torch.tensor(bound / 6).log2().item())
    elif form.name == "nvfp4":
        blocks[..., :4] = 1 + blocks[..., :4] % 8
    for at in _HALVES.get(form.name, ()):
        scale = bound / _LARGEST[form.name]
        blocks[..., at : at + 2] = _bytes(blocks, scale, torch.float16, generator)
    return Weight(data=data, format=form, rows=rows, cols=cols, table=gguf_table(form))


def _bytes(blocks: Tensor, scale: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Returns the bytes of a number in scale / 2 .. scale for each block."""
    numbers = torch.rand(*blocks.shape[:2], 1, generator=generator)
    return ((numbers + 1) * (scale / 2)).to(dtype).view(torch.uint8)
