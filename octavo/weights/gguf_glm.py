"""What a GGUF file of architecture `glm4moe` says of attention. No torch.

Asked by `gguf_config`.
"""

from __future__ import annotations

import math
from typing import Any

from octavo.weights.gguf_reader import Reader


def glm_attention_config(reader: Reader, head_dim: int) -> dict[str, Any]:
    """Returns the keys of attention: norms of heads, and which part of them is rotated."""
    reader.check_implied("attention.value_length", head_dim, "the head size")
    size = reader.size("rope.dimension_count")
    if size > head_dim:
        raise reader.refuse("rope.dimension_count", f"at most the head size, {head_dim}")
    return {
        "use_qk_norm": "blk.0.attn_q_norm.weight" in reader.file.tensors,
        # A little more, so that `size` is what the product with head_dim is rounded down to.
        "partial_rotary_factor": math.nextafter(size / head_dim, 1.0),
    }
