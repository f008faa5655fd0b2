# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""The tensor parallel ranks of an engine as Ray actors, on any host of the cluster.

Rank 0 is in the engine process, beside the actor that starts it (`engine.client`); each other rank
is an actor in a bundle of the same placement group and comes to rank 0's address. They end with
rank 0's connection, and with the actor that owns them.
"""

from __future__ import annotations

import logging
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from octavo.engine.rank_transport import join

logger = logging.getLogger(__name__)


class _Rank:
    """One rank."""

    def run(self, address: str, key: bytes, rank: int) -> bool:
        """Returns, when rank 0 ends it, whether all was well. Raises EngineDeadError if it does not
        reach rank 0."""
        from octavo.engine.rank import repeat

        return repeat(join(address, key, rank))


class RayRanks:
    """Starts ranks 1 to size - 1 in the bundles of a placement group, by number."""

    def __init__(
        self, size: int, cpus: float, gpus: float, placement_group: Any | None = None
    ) -> None:
        """`cpus` and `gpus` are each rank's. Without a group it is that of the calling actor."""
        self.host: str = ray.util.get_node_ip_address()
        self._size = size
        self._resources = {"num_cpus": cpus, "num_gpus": gpus}
        self._group = placement_group or ray.util.get_current_placement_group()
        self._actors: list[Any] = []

    def start(self, address: str, key: bytes) -> None:
        """As `engine.client.RemoteStart`."""
        kind: Any = ray.remote(_Rank)
        for rank in range(1, self._size):
            options: dict[str, Any] = dict(self._resources)
            if self._group is not None:
                options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank
                )
            actor = kind.options(**options).remote()
            actor.run.remote(address, key, rank)
            self._actors.append(actor)
        logger.info("rank 0 is at %s; %d actors come there", address, self._size - 1)
