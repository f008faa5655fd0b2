"""How the value of an option is read, whichever face it came through: text or Python value.

Called by config/ for every field, and by the command line. Never knows what an option means.
"""

from __future__ import annotations

import json
import math
import operator
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.errors import ConfigError

SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
COUNT_UNITS = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "": 1}
"""As vLLM's: 4k is 4,000 and 4K is 4,096."""


def kind_of(name: str, hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns the kind of a field: str, int, float, bool, size, count or list.

    Fails where the annotation says nothing of the kind: no field is guessed.
    """
    if name.endswith("_bytes"):
        return "size"
    if metadata.get("unit") == "tokens":
        return "count"
    members = [one for one in typing.get_args(hint) if one in (str, int, float, bool)]
    if typing.get_origin(hint) is tuple:
        return "list"
    if typing.get_origin(hint) is typing.Literal:
        return "str"
    (plain,) = members or [hint]
    return {str: "str", int: "int", float: "float", bool: "bool"}[plain]


def read_value(name: str, kind: str, metadata: Mapping[str, Any], value: Any) -> Any:
    """Returns a field's value in its own type. Raises ConfigError naming the field.

    None is left alone, as are values that are more than text or a number.
    """
    if value is None:
        return None
    if metadata.get("is_object") and isinstance(value, Mapping):
        value = json.dumps(dict(value))
    value = metadata.get("aliases", {}).get(value, value) if isinstance(value, str) else value
    choices = metadata.get("choices")
    if choices is not None:
        return _choice(name, choices, value)
    try:
        return read_list(value, metadata) if kind == "list" else _READERS[kind](value)
    except (TypeError, ValueError, OverflowError) as error:
        got = "" if metadata.get("is_secret") else f", got {value!r}"
        raise ConfigError(f"{name} must be {error}{got}", field=name) from error


def read_size(value: Any) -> int:
    """Returns bytes from 4096, "512MiB", "80GiB" or "1.5G" (all units are powers of 1024)."""
    if not isinstance(value, str):
        return _counted(value, "a size like 4096, 512MiB or 4GiB")
    plain = value.strip().upper().removesuffix("B").removesuffix("I")
    number, unit = (plain[:-1], plain[-1]) if plain and plain[-1].isalpha() else (plain, "")
    return _scaled(number, SIZE_UNITS.get(unit), "a size like 4096, 512MiB or 4GiB")


def read_count(value: Any) -> int | None:
    """Returns a number of tokens from 4096, "4K" (4,096) or "4k" (4,000); None for "auto"."""
    wanted = "a number of tokens like 4096, 4K or auto"
    if not isinstance(value, str):
        return None if value == -1 else _counted(value, wanted)
    if value in ("auto", "-1"):
        return None
    number, unit = (value[:-1], value[-1]) if value[-1:].isalpha() else (value, "")
    return _scaled(number, COUNT_UNITS.get(unit), wanted)


def read_list(value: Any, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns texts from one or from several; where the metadata says so also from JSON's spelling
    of several, '["a", "b"]', or from one text with separators."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, Sequence) or not all(isinstance(one, str) for one in given):
        raise ValueError("a list of texts")
    separator = metadata.get("separator")
    found: list[str] = []
    for one in given:
        if metadata.get("is_json") and one.lstrip().startswith("["):
            found += _json_list(one)
        else:
            found += [one] if separator is None else _split(one, separator)
    return tuple(found)


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def _json_list(text: str) -> list[str]:
    try:
        read = json.loads(text)
    except ValueError:
        read = None
    if not isinstance(read, list) or not all(isinstance(one, str) for one in read):
        raise ValueError("a list of texts, in JSON if it begins with [")
    return read


def _choice(name: str, choices: Sequence[Any], value: Any) -> Any:
    # A dtype of torch, which is not imported here, is spelt torch.float16.
    spelt = value if isinstance(value, str) else str(value).removeprefix("torch.")
    for choice in choices:
        if spelt == str(choice) and not isinstance(value, bool):
            return choice
    known = ", ".join(str(choice) for choice in choices)
    raise ConfigError(f"{name} {value!r} is unknown; use {known}", field=name)


def _scaled(number: str, factor: int | None, wanted: str) -> int:
    try:
        scaled = int(float(number) * factor) if factor is not None else -1
    except (ValueError, OverflowError):
        scaled = -1
    if scaled < 0:
        raise ValueError(wanted)
    return scaled


def _counted(value: Any, wanted: str) -> int:
    try:
        count = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(wanted)
    return count


def _text(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bool | int | float | Sequence | Mapping) and not isinstance(value, str):
        raise ValueError("a text")
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool | str):
        raise ValueError("an integer")
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError("an integer") from None


def _number(value: Any) -> float:
    if isinstance(value, bool | str) or not math.isfinite(float(value)):
        raise ValueError("a finite number")
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


_READERS = {
    "str": _text,
    "int": _integer,
    "float": _number,
    "bool": _boolean,
    "size": read_size,
    "count": read_count,
}
