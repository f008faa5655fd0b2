"""What the options of traces mean: checks of their values, and how traces travel.

Called by `config`. Knows nothing of OpenTelemetry.
"""

from __future__ import annotations

import re

from octavo.errors import ConfigError

HTTP_PORT = 4318
"""Where collectors take traces by HTTP; by gRPC at 4317."""


def check_traces(endpoint: str | None, sampling: float) -> None:
    """Raises ConfigError naming the option."""
    if endpoint is not None and not re.fullmatch(r"https?://[^/\s]+(/\S*)?", endpoint):
        message = f"otlp_traces_endpoint must be like http://localhost:4317, got {endpoint!r}"
        raise ConfigError(message, field="otlp_traces_endpoint")
    if not 0 <= sampling <= 1:
        message = f"otlp_traces_sampling must be in 0..1, got {sampling}"
        raise ConfigError(message, field="otlp_traces_sampling")


def is_http(endpoint: str, protocol: str) -> bool:
    """Returns whether traces travel in HTTP requests, not by gRPC; `auto` goes by the endpoint."""
    if protocol != "auto":
        return protocol == "http"
    place, _, path = endpoint.partition("://")[2].partition("/")
    return place.endswith(f":{HTTP_PORT}") or bool(path)
