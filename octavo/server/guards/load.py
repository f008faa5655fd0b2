"""From options to the gate of a server: a function that is imported, or a URL.

Called before anything is bound, so that a guard that is not there ends the start, and by whoever
makes the server.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from octavo.config import ServerConfig
from octavo.errors import ConfigError, RequestError
from octavo.guard import Guard, Stage
from octavo.server.engine_client import Engine
from octavo.server.guards.endpoint import Endpoint
from octavo.server.guards.gate import Gate, GateLimits

_STAGES: dict[str, frozenset[Stage]] = {
    "both": frozenset({"input", "output"}),
    "input": frozenset({"input"}),
    "output": frozenset({"output"}),
}


def new_gate(config: ServerConfig, engine: Engine) -> Gate | None:
    """Returns the way to the guard, if there is one. Raises ConfigError, also where the engine has
    no texts to judge."""
    guard = _guard_of(config)
    if guard is None:
        return None
    try:
        _ = engine.tokenizer
    except RequestError as error:
        message = "a guard judges texts, and the engine has no tokenizer; leave one of both out"
        raise ConfigError(message, field="guard") from error
    limits = GateLimits(
        seconds=config.guard_timeout,
        max_concurrent=config.guard_max_concurrent,
        max_waiting=config.guard_max_waiting,
        fails_open=config.guard_fail_open,
    )
    return Gate(guard, limits, _STAGES[config.guard_stages], config.guard_window)


def check_guard(config: ServerConfig) -> None:
    """Raises ConfigError if there is to be a guard, and it cannot be had."""
    _guard_of(config)


def _guard_of(config: ServerConfig) -> Guard | None:
    if config.guard_url is not None:
        return Endpoint(config.guard_url, config.guard_max_concurrent)
    return None if config.guard is None else _imported(config.guard)


def _imported(name: str) -> Guard:
    """Returns what `module:name` says. Raises ConfigError."""
    module, _, path = name.partition(":")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.append(here)  # Behind all others: nothing is hidden by a file that lies there.
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a foreign module raises when it is imported
        message = f"guard {name!r} cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError(message, field="guard") from error
    if not callable(found) or isinstance(found, type):
        message = f"guard {name!r} must be a function of one GuardCheck, got {found!r}"
        raise ConfigError(message, field="guard")
    guard: Any = found
    return guard
