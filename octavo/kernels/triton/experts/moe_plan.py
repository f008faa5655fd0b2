"""How one MoE layer runs: launch shapes by the number of tokens and the sizes of the layer.

Asked by plans.py where nothing was tuned, obeyed by moe.py. Pure arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The launch shape of one product."""

    block_n: int
    block_k: int
    group: int
    num_warps: int
    num_stages: int
    tma: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MoePlan:
    """How one MoE layer runs: pure arithmetic on its shape."""

    is_direct: bool
    """Pairs go one by one (`matvec.moe_of_pairs`), where no batch invariance is promised."""
    block_p: int
    gate_up: Launch
    down: Launch

    def of_floats(self) -> MoePlan:
        """Returns the plan for float32: blocks of as many bytes."""
        gate_up = replace(self.gate_up, block_k=self.gate_up.block_k // 2)
        return replace(
            self, gate_up=gate_up, down=replace(self.down, block_k=self.down.block_k // 2)
        )


def plan_moe(
    num_tokens: int, top_k: int, num_experts: int, inner_size: int, *, can_tma: bool
) -> MoePlan:
    """Returns the launch shapes: measured on an H100 (benchmarks/kernels/experts.py).

    Reading experts is what costs below some 64 tokens an expert, so blocks are low there; a pair
    goes its own way while two tokens seldom share an expert. Bits depend on `is_direct` alone.
    """
    mean = num_tokens * top_k / num_experts
    is_long = inner_size >= 4096
    if num_tokens == 1 or (num_tokens == 2 and 16 * top_k <= num_experts):
        gate_up = _launch(32, 256, 3) if is_long else _launch(32, 128, 4)
        return MoePlan(is_direct=True, block_p=16, gate_up=gate_up, down=_launch(32, 128, 5))
    if mean <= 10:
        down = _launch(64, 256, 3) if is_long else _launch(64, 128, 4)
        return MoePlan(is_direct=False, block_p=16, gate_up=_launch(32, 256, 3), down=down)
    if mean <= 24:
        gate_up, down = _launch(64, 128, 3, group=4), _launch(128, 128, 3, group=4)
        return MoePlan(is_direct=False, block_p=32, gate_up=gate_up, down=down)
    if mean <= 48:
        gate_up, down = _launch(64, 128, 3, group=4), _launch(128, 64, 4, group=4)
        return MoePlan(is_direct=False, block_p=64, gate_up=gate_up, down=down)
    gate_up = Launch(block_n=128, block_k=64, group=4, num_warps=8, num_stages=4, tma=can_tma)
    down = Launch(block_n=256, block_k=64, group=8, num_warps=8, num_stages=4, tma=can_tma)
    return MoePlan(is_direct=False, block_p=128, gate_up=gate_up, down=down)


def _launch(block_n: int, block_k: int, num_stages: int, group: int = 1) -> Launch:
    return Launch(block_n=block_n, block_k=block_k, group=group, num_warps=4, num_stages=num_stages)
