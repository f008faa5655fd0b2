"""Whether traces are wanted and can be had: the one door to what needs OpenTelemetry.

Called by `serve`, before a model is loaded and when the application is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.config import ServerConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.server.tracing.tracer import RequestTracer


def check_tracing(config: ServerConfig) -> None:
    """Raises ConfigError if traces are wanted, and what makes them is not installed."""
    if config.otlp_traces_endpoint is None:
        return
    try:
        import octavo.server.tracing.tracer  # noqa: F401
    except ImportError as error:
        message = (
            f"otlp_traces_endpoint needs packages that are not installed ({error}); "
            "pip install 'octavo[otel]'"
        )
        raise ConfigError(message, field="otlp_traces_endpoint") from error


def new_tracer(config: ServerConfig, model_name: str) -> RequestTracer | None:
    """Returns what traces requests, if that is wanted."""
    if config.otlp_traces_endpoint is None:
        return None
    from octavo.server.tracing.tracer import RequestTracer

    return RequestTracer(config, (config.served_model_name or (model_name,))[0])
