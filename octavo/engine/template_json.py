"""Owns the filter `tojson` of chat templates.

Called by templates, with the arguments of transformers' filter of this name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from octavo.engine.tool_messages import CallArguments


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Returns JSON that does not escape HTML; arguments of past calls as the model wrote them."""
    spelled: list[str] = []
    if indent is None and separators is None:
        value = _with_marks(value, spelled)
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        default=_plain,
    )
    for number, arguments in enumerate(spelled):
        # As the model wrote them: the prompt so far has them in these words.
        text = text.replace(json.dumps(_mark(number), ensure_ascii=ensure_ascii), arguments, 1)
    return text


def _with_marks(value: Any, spelled: list[str]) -> Any:
    """Returns a call, a list of calls or arguments with marks in place of arguments, whose texts
    go to `spelled`; all else as it is."""
    if isinstance(value, CallArguments):
        spelled.append(value.text)
        return _mark(len(spelled) - 1)
    if isinstance(value, Mapping) and not value.keys().isdisjoint(("function", "arguments")):
        return {
            key: _with_marks(one, spelled) if key in ("function", "arguments") else one
            for key, one in value.items()
        }
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return [_with_marks(one, spelled) for one in value]
    return value


def _mark(number: int) -> str:
    return f"\U000f3000{number}\U000f3001"


def _plain(value: Any) -> Any:
    """Lets tojson take any mapping or sequence."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
