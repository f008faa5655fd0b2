# pyright: reportMissingImports=false
"""How many engine replicas an app should have: by requests, and by use of the KV cache.

Called by Ray Serve's controller, with what ingresses and replicas have told over the last while;
minimum, maximum and delays are Ray Serve's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

KV_USE = "kv_use"
"""As `replica` names it: Ray Serve pickles this module by value, so that it stands alone."""


class QueueAndCache:
    """Enough replicas that each has `target_requests`, running and waiting, and uses `target_kv` of
    its KV cache (0 to 1)."""

    def __init__(self, target_requests: float, target_kv: float) -> None:
        self._target_requests = target_requests
        self._target_kv = target_kv

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """Returns the number wanted, which may be a fraction, and no state."""
        uses = (context.aggregated_metrics or {}).get(KV_USE, {})
        by_requests = context.total_num_requests / self._target_requests
        by_kv = sum(uses.values()) / self._target_kv
        return max(by_requests, by_kv), {}
