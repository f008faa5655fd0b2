"""Options of the server where others listen in its place: by name, from YAML or JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.vllm_options import nearest

_OF_SOCKETS = "host port metrics_port api_processes ssl_certfile preemption_notice".split()


def read_server_options(given: Mapping[str, Any], who_listens: str) -> ServerConfig:
    """Returns the options, keys of the environment among them. Raises ConfigError naming one that
    no server has, or that `who_listens` has in its place."""
    known = {one.name for one in fields(ServerConfig)}
    for name in given:
        if name in _OF_SOCKETS:
            raise ConfigError(f"server has no {name} here: {who_listens}", field=name)
        if name not in known:
            near = nearest(name, known)
            hint = f"; do you mean {near}?" if near else ""
            raise ConfigError(f"server has no {name!r}{hint}", field=name)
    values: dict[str, Any] = dict(given)
    for name, value in given.items():
        if isinstance(value, list):  # YAML and JSON have no tuples
            values[name] = tuple(value)
    return ServerConfig(**values).resolve()
