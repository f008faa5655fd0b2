"""The mixture of experts: route, run the chosen experts, add the shared expert.

Held by the decoder. Dispatch, experts and combine are one op, so that a back end can fuse them;
the layer never sees which tokens went where, apart from counting them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from octavo.kernels.ops import Activation, ExpertWeights, Ops, RouterScoring
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """An MLP for every token, scaled by the sigmoid of `gate` where there is one."""

    mlp: GatedMLP
    gate: Linear | None

    def run(self, x_TM: Tensor, ops: Ops) -> Tensor:
        """Returns [T, M]."""
        out_TM = self.mlp.run(x_TM, ops)
        if self.gate is not None:
            out_TM *= _sigmoid(self.gate.run(x_TM, ops), ops)
        return out_TM


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """Sum of the `top_k` best experts of each token, weighted by the router."""

    router: Linear
    experts: ExpertWeights
    shared: SharedExpert | None
    activation: Activation
    top_k: int
    scoring: RouterScoring
    renormalize: bool

    def run(self, x_TM: Tensor, ops: Ops, counts_E: Tensor) -> Tensor:
        """Returns [T, M]; adds the number of tokens sent to each expert to counts_E (int64)."""
        logits_TE = self.router.run(x_TM, ops)
        weights, ids = ops.route(logits_TE, self.top_k, self.scoring, self.renormalize)
        counts_E += torch.bincount(ids.flatten(), minlength=len(counts_E))
        out_TM = ops.moe(x_TM, weights, ids, self.experts, self.activation)
        if self.shared is not None:
            out_TM += self.shared.run(x_TM, ops)
        return out_TM


def _sigmoid(x_T1: Tensor, ops: Ops) -> Tensor:
    """softmax([x, 0])[0]. torch.sigmoid takes its vectors in another way than what is left over at
    the end, so that a token's last bit would depend on its place in the batch; `route` does not."""
    logits_T2 = torch.cat((x_T1, torch.zeros_like(x_T1)), dim=1)
    weights, ids = ops.route(logits_T2, 2, "softmax", False)
    return torch.where(ids[:, :1] == 0, weights[:, :1], weights[:, 1:])
