# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""The deployments of an app on Ray Serve: engines, and the HTTP API of `octavo serve` before them.

Made by `build_app`. An ingress has the app that `octavo serve` has, over an AsyncLLM whose engines
are the replicas; what is bound to Ray is here, in `ranks` and in `request_router`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from octavo.deploy.ray.autoscaling import QueueAndCache
from octavo.deploy.ray.fleet import RayFleet, Stream
from octavo.deploy.ray.options import AppOptions, for_cluster
from octavo.deploy.ray.ranks import RayRanks
from octavo.deploy.ray.replica import EngineReplica
from octavo.observe.logs import LogFormat, configure_logging
from octavo.server.app import create_app
from octavo.server.beside import beside

ROUTER = "octavo.deploy.ray.request_router.NamedReplicaRouter"
SPARE_REQUESTS = 64
"""Calls that are no requests: looks, statistics, aborts."""
HEALTH_SECONDS = 5.0
METRICS_SECONDS, LOOK_BACK_SECONDS = 2.0, 6.0
"""How often replicas tell how much they have to do, and over what time that is averaged."""


class Engine(EngineReplica):
    """One engine as a deployment."""

    async def __init__(
        self, config: EngineConfig, log: tuple[LogFormat, str], rank_resources: dict[str, float]
    ) -> None:
        size, asked = config.tensor_parallel_size, rank_resources
        ranks = RayRanks(size, asked["CPU"], asked["GPU"]) if size > 1 else None
        configure_logging(*log)
        name = serve.get_replica_context().replica_id.unique_id
        await self.start(name, config, log, ranks)

    async def __del__(self) -> None:
        await self.close()


class Calls:
    """A handle of Ray Serve as `fleet.Handle`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)

    async def look(self, numbers: dict[str, int]) -> list[bytes | BaseException]:
        try:
            asked = self._handle.broadcast("look", numbers)
            return await asked.results_async(return_exceptions=True)
        except DeploymentUnavailableError:  # there is no replica
            return []

    def generate(self, name: str, data: bytes) -> Stream:
        stream: Any = self._streams.generate.remote(name, data)
        return stream

    async def call(self, method: str, name: str, *arguments: Any) -> Any:
        return await getattr(self._handle, method).remote(name, *arguments)


@serve.ingress()
class Ingress:
    """The HTTP API over all engines."""

    async def __init__(
        self, config: EngineConfig, server: ServerConfig, engines: DeploymentHandle
    ) -> None:
        configure_logging(server.log_format, server.log_level)
        self._running = AsyncExitStack()
        engine = AsyncLLM(
            config,
            log_format=server.log_format,
            log_level=server.log_level,
            connect=lambda owner: RayFleet(owner, Calls(engines)),
        )
        await self._running.enter_async_context(engine)
        self._app = create_app(engine, server)
        await self._running.enter_async_context(beside(self._app.state.server))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def __del__(self) -> None:
        await self._running.aclose()


def build(options: AppOptions) -> serve.Application:
    """Returns the application. Raises ConfigError if the cluster that this process is connected to
    has not what is asked for.

    What is bound is what must be loaded again when it changes: numbers of replicas are not.
    """
    if ray.is_initialized():
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        options = for_cluster(options, nodes)
    server, config = options.server, options.engine
    most = config.max_num_seqs + config.max_num_queued_requests + SPARE_REQUESTS
    # Its limits are those of all engines together.
    of_all = replace(config, data_parallel_size=options.max_replicas, kv_events_config=None)
    common: dict[str, Any] = {
        "graceful_shutdown_timeout_s": server.shutdown_timeout,
        "graceful_shutdown_wait_loop_s": 0.5,
        "logging_config": {"enable_access_log": False},  # the app has its own
    }
    engine: Any = serve.deployment(
        Engine,
        name="engines",
        **_resources(options),
        max_ongoing_requests=most,
        autoscaling_config=_autoscaling(options),
        request_router_config={"request_router_class": ROUTER},
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=6 * HEALTH_SECONDS,
        **common,
    )
    ingress: Any = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=options.num_ingresses,
        ray_actor_options={"num_cpus": options.cpus_per_ingress},
        max_ongoing_requests=most * options.max_replicas,
        **common,
    )
    log = (server.log_format, server.log_level)
    return ingress.bind(of_all, server, engine.bind(config, log, options.rank_resources))


def _resources(options: AppOptions) -> dict[str, Any]:
    """All ranks of an engine together, on one node where they fit one."""
    asked, size = options.rank_resources, options.engine.tensor_parallel_size
    actor = {"num_cpus": asked["CPU"], "num_gpus": asked["GPU"]}
    if size == 1:
        return {"ray_actor_options": actor}
    bundle = {name: amount for name, amount in asked.items() if amount}
    return {
        "ray_actor_options": actor,
        "placement_group_bundles": [bundle] * size,
        "placement_group_strategy": "PACK",
    }


def _autoscaling(options: AppOptions) -> AutoscalingConfig:
    targets = {"target_requests": options.target_requests, "target_kv": options.target_kv}
    return AutoscalingConfig(
        min_replicas=options.min_replicas,
        max_replicas=options.max_replicas,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        metrics_interval_s=METRICS_SECONDS,
        look_back_period_s=LOOK_BACK_SECONDS,
        policy=AutoscalingPolicy(policy_function=QueueAndCache, policy_kwargs=targets),
    )
