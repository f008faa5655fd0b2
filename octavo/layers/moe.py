"""The mixture of experts: route, run the chosen experts, add the shared expert.

Held by the decoder. Dispatch, experts and combine are one op, so that a back end can fuse them;
the layer never sees which tokens went where.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from octavo.kernels.ops import Activation, ExpertWeights, Ops, RouterScoring
from octavo.layers.linear import Linear
from octavo.layers.mlp import GatedMLP


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """An MLP for every token, scaled by the sigmoid of `gate` where there is one."""

    mlp: GatedMLP
    gate: Linear | None

    def add_to(self, out_TM: Tensor, x_TM: Tensor, ops: Ops) -> None:
        """out += sigmoid(gate(x)) * mlp(x), in place."""
        gate_T1 = None if self.gate is None else self.gate.run(x_TM, ops)
        ops.add_gated(out_TM, self.mlp.run(x_TM, ops), gate_T1)


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

    def run(
        self, x_TM: Tensor, ops: Ops, counts_E: Tensor, num_live: Tensor | None = None
    ) -> Tensor:
        """Returns [T, M]; adds the number of tokens sent to each expert to counts_E. Tokens from
        num_live on are padding (see `Ops.route`)."""
        logits_TE = self.router.run(x_TM, ops)
        weights, ids = ops.route(
            logits_TE, self.top_k, self.scoring, self.renormalize, counts_E, num_live
        )
        out_TM = ops.moe(x_TM, weights, ids, self.experts, self.activation)
        if self.shared is not None:
            self.shared.add_to(out_TM, x_TM, ops)
        return out_TM
