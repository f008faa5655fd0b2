# pyright: reportMissingImports=false
"""Ray Serve's request router for engines: a request goes to the replica that its ingress has named.

Who that is the ingress decides (`octavo.fleet`, through `deploy.ray.fleet`): it alone knows what a
prompt's tokens are, what has begun and what engines hold. Ray Serve pickles this module by value:
it stands alone.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class NamedReplicaRouter(RequestRouter):
    """The first argument of every call is the name of its replica."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Returns the named replica, and behind it all others: one of them tells the ingress at
        once that the replica is gone or full."""
        if pending_request is None:
            return [list(candidate_replicas)]
        pending_request.routing_context.should_backoff = True
        name = pending_request.args[0] if pending_request.args else ""
        named = [one for one in candidate_replicas if one.replica_id.unique_id == name]
        others = [one for one in candidate_replicas if one.replica_id.unique_id != name]
        return [named, others]
