"""How a token's experts are chosen and weighed, as frozen data. No torch.

Part of a model's spec, given to the ops inside a `Router`. Never holds a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Score = Literal["softmax", "sigmoid", "sqrt_softplus", "logit"]
GroupScore = Literal["best", "best_two"]
ExpertWeighting = Literal["score", "softmax", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRule:
    """From the logits of all experts to the chosen ones and their weights, in float32.

    1. Each expert has a score: softmax over all experts, sigmoid, sqrt(softplus), or the logit.
    2. The `top_k` best are chosen by score plus correction, where the router has one; if there are
       groups, of the `top_groups` best groups alone. Of equal ones the lower expert (or group).
    3. A chosen expert weighs its score without the correction, or another function of its logit.
    4. With `renormalize` the weights are divided by max(their sum + sum_epsilon, least_sum).
    5. They are multiplied by `scale`, and by the expert's own scale where the router has some.
    """

    top_k: int
    score: Score = "softmax"
    num_groups: int = 1
    """Groups of equally many experts, in order."""
    top_groups: int = 1
    group_score: GroupScore = "best"
    """What a group is chosen by: its best corrected score, or the sum of its two best."""
    weighting: ExpertWeighting = "score"
    """softmax: over the logits of the chosen experts alone."""
    renormalize: bool
    sum_epsilon: float = 0.0
    least_sum: float = 0.0
    scale: float = 1.0
    scales_input: bool = False
    """The weight multiplies what the expert reads, and not what it writes (Llama 4)."""
    float32_logits: bool = False
    """The logits are never rounded to the activations' dtype."""

    @property
    def is_plain(self) -> bool:
        """Whether it is softmax, top k and perhaps a division by the sum, which back ends fuse."""
        plain = RoutingRule(
            top_k=self.top_k,
            renormalize=self.renormalize,
            scales_input=self.scales_input,
            float32_logits=self.float32_logits,
        )
        return self == plain

    @property
    def is_softmax_of_chosen(self) -> bool:
        """Whether weights are the softmax over the chosen logits alone, which is that over all of
        them divided by the sum of the chosen."""
        of_chosen = RoutingRule(
            top_k=self.top_k,
            score="logit",
            weighting="softmax",
            renormalize=False,
            float32_logits=self.float32_logits,
        )
        return self == of_chosen
