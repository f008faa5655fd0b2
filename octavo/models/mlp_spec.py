"""What the MLP of one layer is, dense or of experts, as frozen data.

Part of a `LayerSpec`. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from octavo.kernels.activations import Activation
from octavo.kernels.routing import RoutingRule
from octavo.models.parameter import Shape
from octavo.weights.split import Split

MLP_co = TypeVar("MLP_co", covariant=True)


class MLPs(Protocol[MLP_co]):
    """Who makes something of each kind of MLP: a method a kind."""

    def dense(self, spec: MLPSpec, layer: int) -> MLP_co: ...

    def moe(self, spec: MoESpec, layer: int) -> MLP_co: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MLPSpec:
    """A gated MLP: act(x @ gate.T, x @ up.T) @ down.T."""

    size: int
    activation: Activation

    def made_by(self, mlps: MLPs[MLP_co], layer: int) -> MLP_co:
        return mlps.dense(self, layer)

    @property
    def split(self) -> Split:
        return Split(axis="rows", unit="hidden units", num_units=self.size)

    def of_rank(self, size: int) -> MLPSpec:
        return replace(self, size=self.split.share(size))

    def parameters(self, hidden: int, prefix: str = "") -> Iterator[tuple[str, int, Shape]]:
        """Yields every tensor: its name, -1 (no expert) and its shape."""
        yield from _gated(prefix, -1, self.size, hidden)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoESpec:
    """Experts that are gated MLPs of equal size, and perhaps one that every token goes to."""

    num_experts: int
    expert_size: int
    activation: Activation
    rule: RoutingRule
    router_bias: bool = False
    has_correction: bool = False
    """The router has what is added to the scores for the choice alone."""
    expert_bias: bool = False
    shared_size: int = 0
    """Hidden size of the shared expert; 0: there is none."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by a sigmoid gate of the token."""
    is_whole: bool = False
    """Ranks share the experts, each of which one rank has whole; else all have a part of each."""
    num_held: int | None = None
    """Experts that a rank has; None: all."""

    def made_by(self, mlps: MLPs[MLP_co], layer: int) -> MLP_co:
        return mlps.moe(self, layer)

    @property
    def top_k(self) -> int:
        """Experts that a token goes to."""
        return self.rule.top_k

    @property
    def split(self) -> Split:
        return Split(axis="rows", unit="hidden units of an expert", num_units=self.expert_size)

    @property
    def expert_split(self) -> Split:
        """How ranks share whole experts."""
        return Split(axis="rows", unit="experts", num_units=self.num_experts)

    @property
    def shared(self) -> MLPSpec | None:
        """The expert that every token goes to."""
        return (
            MLPSpec(size=self.shared_size, activation=self.activation) if self.shared_size else None
        )

    def of_rank(self, size: int) -> MoESpec:
        shared_size = self.shared.of_rank(size).size if self.shared else 0
        if self.is_whole:
            num_held = self.expert_split.share(size)
            return replace(self, num_held=num_held, shared_size=shared_size)
        return replace(self, expert_size=self.split.share(size), shared_size=shared_size)

    def parameters(self, hidden: int) -> Iterator[tuple[str, int, Shape]]:
        """Yields every tensor: its name, its expert (-1: none) and its shape."""
        yield "router", -1, (self.num_experts, hidden)
        if self.router_bias:
            yield "router_bias", -1, (self.num_experts,)
        if self.has_correction:
            yield "router_correction", -1, (self.num_experts,)
        for expert in range(self.num_held or self.num_experts):
            yield from _gated("expert_", expert, self.expert_size, hidden)
            if self.expert_bias:
                yield "expert_gate_bias", expert, (self.expert_size,)
                yield "expert_up_bias", expert, (self.expert_size,)
                yield "expert_down_bias", expert, (hidden,)
        if self.shared is not None:
            yield from self.shared.parameters(hidden, "shared_")
            if self.shared_gate:
                yield "shared_router", -1, (1, hidden)


def _gated(prefix: str, expert: int, size: int, hidden: int) -> Iterator[tuple[str, int, Shape]]:
    yield f"{prefix}gate", expert, (size, hidden)
    yield f"{prefix}up", expert, (size, hidden)
    yield f"{prefix}down", expert, (hidden, size)
