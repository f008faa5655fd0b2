"""What an app on Ray Serve is made of, and whether a cluster has it. Knows nothing of Ray.

Read from the `args` of a YAML file for `serve run`, or from a dictionary in Python.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from octavo.config import EngineConfig, ServerConfig
from octavo.deploy.server_options import read_server_options
from octavo.errors import ConfigError
from octavo.vllm_options import log_verdicts, nearest, read_options

Resources = Mapping[str, float]
"""Of a node, or of what is asked for: how much by name, CPU and GPU among them."""

_WHO_LISTENS = "Ray Serve's proxies listen (`http_options`)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """One app. All but engine and server have the names that `args` have."""

    engine: EngineConfig
    server: ServerConfig
    min_replicas: int = 1
    """Engines, each with all of the model on tensor_parallel_size ranks."""
    max_replicas: int = 1
    num_ingresses: int = 1
    """Processes that speak HTTP. Limits of tenants count in each of them by itself."""
    cpus_per_rank: float = 1.0
    gpus_per_rank: float | None = None
    """None: 1 where the engine's device is cuda, or auto and the cluster has a GPU."""
    cpus_per_ingress: float = 1.0
    target_requests: float | None = None
    """Requests, running and waiting, that an engine should have; half of max_num_seqs if None."""
    target_kv: float = 0.8
    """Share of its KV cache that an engine should use at most."""
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    wait_for_resources: bool = False
    """Whether what the cluster has not yet will come: then nothing is refused."""

    @property
    def rank_resources(self) -> dict[str, float]:
        return {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank or 0.0}


def read_app_options(args: Mapping[str, Any]) -> AppOptions:
    """Returns the options in `args`: model, engine (options of `octavo serve`, by their names in
    Python), server (the same), and AppOptions' fields. Raises ConfigError naming the field."""
    known = {one.name for one in fields(AppOptions)} | {"model"}
    for name in args:
        if name not in known:
            near = nearest(name, known)
            hint = f"do you mean {near}? " if near else ""
            message = f"args has no {name!r}; {hint}valid are {', '.join(sorted(known))}"
            raise ConfigError(message, field=name)
    if not isinstance(model := args.get("model"), str):
        raise ConfigError("args needs model: a folder, a .gguf file or an id", field="model")
    engine, verdicts = read_options(model, _mapping(args, "engine"))
    log_verdicts(verdicts)
    if engine.data_parallel_size > 1:
        raise ConfigError(
            "data_parallel_size is for engines of one host; here min_replicas and max_replicas say "
            "how many there are",
            field="data_parallel_size",
        )
    given = {name: args[name] for name in args.keys() - {"model", "engine", "server"}}
    server = read_server_options(_mapping(args, "server"), _WHO_LISTENS)
    options = AppOptions(engine=engine, server=server, **given)
    _check(options)
    if options.target_requests is None:
        options = replace(options, target_requests=max(engine.max_num_seqs / 2, 1.0))
    return options


def _mapping(args: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = args.get(name) or {}
    if not isinstance(found, Mapping):
        message = f"{name} must be a mapping of options, got {type(found).__name__}"
        raise ConfigError(message, field=name)
    return found


def _check(options: AppOptions) -> None:
    for name in ("min_replicas", "max_replicas", "num_ingresses"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            message = f"{name} must be an integer of at least 1, got {value!r}"
            raise ConfigError(message, field=name)
    if options.max_replicas < options.min_replicas:
        raise ConfigError(
            f"max_replicas is {options.max_replicas}, less than min_replicas, "
            f"{options.min_replicas}",
            field="max_replicas",
        )
    for name in (
        *("cpus_per_rank", "gpus_per_rank", "cpus_per_ingress", "target_requests", "target_kv"),
        *("upscale_delay_s", "downscale_delay_s"),
    ):
        value = getattr(options, name)
        if value is not None and (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 <= value < math.inf
            or (name.startswith("target") and not value)
        ):
            wanted = "above 0" if name.startswith("target") else "of at least 0"
            raise ConfigError(f"{name} must be a number {wanted}, got {value!r}", field=name)


def for_cluster(options: AppOptions, nodes: Sequence[Resources]) -> AppOptions:
    """Returns the options with what depends on the cluster. Raises ConfigError if it has not what
    `min_replicas` engines and the ingresses need, saying which and how many there are."""
    if options.gpus_per_rank is None:
        has_gpu = any(node.get("GPU", 0) for node in nodes)
        wants = options.engine.device == "cuda" or (options.engine.device == "auto" and has_gpu)
        options = replace(options, gpus_per_rank=1.0 if wants else 0.0)
    if options.wait_for_resources:
        return options
    num_ranks = options.engine.tensor_parallel_size * options.min_replicas
    asked = [options.rank_resources] * num_ranks
    asked += [{"CPU": options.cpus_per_ingress}] * options.num_ingresses
    if not _fits(asked, nodes):
        total: Counter[str] = Counter()
        for one in asked:
            total.update({name: amount for name, amount in one.items() if amount})
        each = "; ".join(_words(node) for node in nodes) or "none"
        raise ConfigError(
            f"{options.min_replicas} replicas of {options.engine.tensor_parallel_size} ranks "
            f"({_words(options.rank_resources)} each) and {options.num_ingresses} ingresses need "
            f"{_words(total)}; the cluster has {len(nodes)} nodes: {each}. Start more nodes, ask "
            "for less (min_replicas, tensor_parallel_size, cpus_per_rank, gpus_per_rank), or set "
            "wait_for_resources where nodes are still to come",
            field="min_replicas",
        )
    return options


def _fits(asked: Sequence[Resources], nodes: Sequence[Resources]) -> bool:
    """Whether each that is asked for has a place in one node; the largest first, the fullest node
    that it fits first, which finds a way where pieces are of two sizes."""
    free = [dict(node) for node in nodes]
    for one in sorted(asked, key=lambda one: (one.get("GPU", 0), one.get("CPU", 0)), reverse=True):
        places = [
            node
            for node in free
            if all(node.get(name, 0) >= amount for name, amount in one.items() if amount)
        ]
        if not places:
            return False
        # What needs no GPU leaves nodes alone that have some.
        best = min(places, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
        for name, amount in one.items():
            best[name] = best.get(name, 0) - amount
    return True


def _words(resources: Resources) -> str:
    shown = [f"{amount:g} {name}" for name in ("CPU", "GPU") if (amount := resources.get(name, 0))]
    return ", ".join(shown) or "no CPU and no GPU"
