"""What every option is made of: a field with its help, and how its value is read and checked.

Called by `config.engine` and `config.server`. Never knows an option.
"""

from __future__ import annotations

import typing
from dataclasses import field, fields
from typing import Any

from octavo.errors import ConfigError
from octavo.option_values import kind_of, read_value

MAX_SECONDS = 86400
"""The longest that an option may ask to wait."""


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field whose help text the CLI and the docs show; no repr shows a secret."""
    is_shown = not more.get("is_secret", False)
    return field(default=default, repr=is_shown, metadata={"help": help, **more})


def values_of(config: Any) -> dict[str, Any]:
    """Returns the fields of a config, each read by its kind. Raises ConfigError."""
    hints = typing.get_type_hints(type(config))
    return {
        one.name: read_value(
            one.name,
            kind_of(one.name, hints[one.name], one.metadata),
            one.metadata,
            getattr(config, one.name),
        )
        for one in fields(config)
    }


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}", field=name)


def check_seconds(name: str, value: float) -> None:
    if not 0 <= value <= MAX_SECONDS:
        message = f"{name} must be from 0 to {MAX_SECONDS} seconds, got {value!r}"
        raise ConfigError(message, field=name)


def read_address(name: str, value: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT. Raises ConfigError."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        message = f"{name} must be HOST:PORT with a port in 1..65535, got {value!r}"
        raise ConfigError(message, field=name)
    if host in ("0.0.0.0", "*"):
        message = f"{name} must be an address that other hosts can reach, got {value!r}"
        raise ConfigError(message, field=name)
    return host, int(port)
