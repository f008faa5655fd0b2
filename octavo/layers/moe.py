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
        if self.gate is None:
            return out_TM
        return out_TM.mul_(torch.sigmoid(self.gate.run(x_TM, ops)))


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
