"""A Ray cluster of two nodes on this host with an Octavo app, driven by lines on stdin.

Run by the tests in a Python that has Ray. Each line is a JSON list, a command and its arguments;
each answer a JSON line on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from octavo.deploy.ray import build_app

APP = "octavo"
NODE = {"object_store_memory": 10**8, "include_dashboard": False}


def _actors(deployment: str) -> dict[str, str]:
    """Returns the names of replicas' actors by the names of the replicas."""
    named = ray.util.list_named_actors(all_namespaces=True)
    mark = f"{APP}#{deployment}#"
    return {one["name"].rpartition("#")[2]: one["name"] for one in named if mark in one["name"]}


def replicas(deployment: str = "engines") -> list[str]:
    return list(_actors(deployment))


def kill(name: str) -> str:
    ray.kill(ray.get_actor(_actors("engines")[name], namespace="serve"), no_restart=True)
    return name


def deploy(args: dict[str, Any], is_awaited: bool = True) -> str:
    """Returns what went wrong; empty if all is well."""
    try:
        app = build_app(args)
        # As `serve run` does.
        (serve.run if is_awaited else serve.api._run)(app, name=APP, route_prefix="/")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def status() -> dict[str, Any]:
    app = serve.status().applications[APP]
    each = {name: dict(one.replica_states) for name, one in app.deployments.items()}
    return {"app": app.status, **each}


def nodes_of_ranks() -> list[str]:
    """Returns the nodes of each rank of engines that have several."""
    groups = ray.util.placement_group_table().values()
    return [
        node
        for group in groups
        if group["state"] == "CREATED"
        for node in group["bundles_to_node_id"].values()
    ]


COMMANDS: dict[str, Callable[..., Any]] = {
    "replicas": replicas,
    "kill": kill,
    "deploy": deploy,
    "status": status,
    "nodes_of_ranks": nodes_of_ranks,
}


def two_nodes(cpus_per_node: int) -> Cluster:
    """Returns a running cluster. Ray gives a node 30 s to start, which a busy host may miss."""
    for _ in range(2):
        try:
            return _two_nodes(cpus_per_node)
        except Exception as error:  # Ray's own has no name
            print(f"once more: {error}", file=sys.stderr)
    return _two_nodes(cpus_per_node)


def _two_nodes(cpus_per_node: int) -> Cluster:
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=cpus_per_node, **NODE)
        cluster.add_node(num_cpus=cpus_per_node, object_store_memory=NODE["object_store_memory"])
    except Exception:
        cluster.shutdown()
        raise
    return cluster


def main(cpus_per_node: int, port: int) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is none of the answers
    cluster = two_nodes(cpus_per_node)
    ray.init(address=cluster.address)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            print(json.dumps(COMMANDS[command](*arguments)), file=answers, flush=True)
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
