"""The biases of the experts' last products, added to the sum of a token's experts.

Called by `choose.py`. Those of the first products are added where the products are made.
"""

from __future__ import annotations

from torch import Tensor


def add_biases(out_TM: Tensor, topk_weights: Tensor, topk_ids: Tensor, down_EM: Tensor) -> Tensor:
    """Adds to out, in place, each token's weighted sum of the biases of its experts' last products;
    ids outside [0, E) add nothing."""
    num_experts = len(down_EM)
    is_known = (topk_ids >= 0) & (topk_ids < num_experts)
    weights = topk_weights.masked_fill(~is_known, 0.0)
    spread = weights.new_zeros((len(weights), num_experts))
    spread.scatter_add_(1, topk_ids.masked_fill(~is_known, 0).long(), weights)
    return out_TM.add_((spread @ down_EM).to(out_TM.dtype))
