"""What no engine can beat: bytes over bandwidth and FLOPs over peak, from a model's spec.

Used by `octavo bench workloads`. Counts what must be read and multiplied once, at best; never
measures anything.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from octavo.formats import KVFormats
from octavo.models.spec import ModelSpec, MoESpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a device was measured to reach: copies (read + written) and large bf16 products."""

    bytes_per_second: float
    flops_per_second: float


CEILINGS = {
    "NVIDIA H100 80GB HBM3": Ceilings(bytes_per_second=3.0e12, flops_per_second=776e12),
}
"""By the device's name; others have no floor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What must move and be multiplied."""

    bytes_: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(bytes_=self.bytes_ + other.bytes_, flops=self.flops + other.flops)

    def seconds(self, ceilings: Ceilings) -> float:
        """The slower of the two, as if they overlapped perfectly."""
        moving = self.bytes_ / ceilings.bytes_per_second
        return max(moving, self.flops / ceilings.flops_per_second)


@dataclass(frozen=True, slots=True)
class Experts:
    """Equal expert layers: each token goes to `top_k` of `count`, as if drawn evenly."""

    count: int
    top_k: int
    parameters: int
    """Of all experts together."""

    def share_hit(self, num_tokens: int) -> float:
        """Returns the expected share of the experts that `num_tokens` tokens need."""
        return 1 - (1 - self.top_k / self.count) ** num_tokens


class Floors:
    """The least work of steps of one model."""

    def __init__(self, spec: ModelSpec, *, element_bytes: float, kv: KVFormats) -> None:
        """`element_bytes` are those of one weight, on average."""
        dense, expert_sizes = 0, Counter[int]()
        for parameter, shape in spec.parameters():
            if parameter.expert >= 0:
                expert_sizes[parameter.layer] += math.prod(shape)
            elif parameter.name not in ("embedding", "lm_head"):
                dense += math.prod(shape)
        kinds = Counter[tuple[int, int]]()
        for layer, parameters in expert_sizes.items():
            mlp = spec.layers[layer].mlp
            assert isinstance(mlp, MoESpec)
            kinds[mlp.num_experts, mlp.top_k] += parameters
        self._element_bytes = element_bytes
        self._hidden = spec.hidden_size
        self._head = spec.vocab_size * spec.hidden_size
        self._dense = dense
        self._experts = tuple(Experts(*kind, total) for kind, total in kinds.items())
        layers = zip(spec.layers, spec.kv_specs(kv), strict=True)
        self._attentions = Counter((one.attention, kept.token_bytes) for one, kept in layers)

    def step(self, sequences: Sequence[tuple[int, int]], *, shared: int = 0) -> Work:
        """Returns the work of one step that samples once per sequence.

        A sequence is (new tokens, tokens of its own before them); `shared` tokens stand before
        all of them and are read once.
        """
        num_tokens = sum(new for new, _ in sequences)
        read = self._dense + self._head + num_tokens * self._hidden
        active = float(self._dense)
        for experts in self._experts:
            read += experts.parameters * experts.share_hit(num_tokens)
            active += experts.parameters * experts.top_k / experts.count
        weights = Work(
            bytes_=read * self._element_bytes,
            flops=2 * (active * num_tokens + self._head * len(sequences)),
        )
        return weights + self._attention(sequences, shared)

    def _attention(self, sequences: Sequence[tuple[int, int]], shared: int) -> Work:
        total = Work()
        for (attention, token_bytes), num_layers in self._attentions.items():
            window = attention.visibility.most_visible or sys.maxsize
            own = before = pairs = 0
            for new, context in sequences:
                seen = min(shared + context + new, window + new - 1)
                mine = min(seen, context + new)
                own += mine
                before = max(before, seen - mine)
                causal = new * (shared + context) + new * (new + 1) // 2
                pairs += min(causal, new * window)
            total += Work(
                bytes_=num_layers * (own + before) * token_bytes,
                flops=float(num_layers * pairs * attention.pair_flops),
            )
        return total

    def mixed(self, prompts: Sequence[int], outputs: Sequence[int]) -> Work:
        """Returns the work of requests that all decode side by side from the start.

        The prompts' products ride on the decode steps, which read the weights anyway; there is
        room for all KV.
        """
        prefill = self.step([(prompt, 0) for prompt in prompts])
        total = Work(flops=prefill.flops)
        lengths = list(zip(prompts, outputs, strict=True))
        for made in range(1, max(outputs)):
            total += self.step([(1, prompt + made) for prompt, output in lengths if output > made])
        return total
