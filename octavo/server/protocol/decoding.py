"""From the bytes of a body to a model of the protocol: JSON, its limits, its fields.

Called by `server.body` in the event loop for what is quick, by `server.parser` in a process of its
own for all else. Never imports the HTTP stack: that process would load it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import msgspec
from pydantic import BaseModel

from octavo.engine.chat_template import ChatRenderer
from octavo.engine.messages import is_unicode
from octavo.errors import RequestError, shown
from octavo.server.protocol.parsing import parse
from octavo.server.protocol.strict import StrictModel

MAX_RETURNED_VALUES = 65_536
"""Of one field, for whom they are objects: a list, a text and a number are a value each."""
MAX_DEPTH = 64
"""Lists and objects within each other; what reads them afterwards may recurse."""

Body = TypeVar("Body", bound=StrictModel)


def parse_body(model: type[Body], content: bytes, renderer: ChatRenderer | None) -> Body:
    """Returns a body as a `model`, of a chat the text in place of its messages.

    For long bodies: what is returned has few objects, however many `content` has; without a
    renderer, at most MAX_RETURNED_VALUES. Raises RequestError, ChatTemplateError among them.
    """
    body = parse(model, decode(content))
    body.check_size()
    if renderer is not None:
        return body.with_rendered(renderer)
    _check_values(body)
    return body


def _check_values(body: StrictModel) -> None:
    """Raises RequestError for lists and objects of so many values that whoever gets them from
    another process would stand still meanwhile. Lists of numbers and texts have limits of their
    own."""
    for name in body.model_fields_set:
        level, num_values = [getattr(body, name)], 0
        while level:
            level = [each for one in level for each in _values_in(one)]
            num_values += len(level)
            if num_values > MAX_RETURNED_VALUES:
                message = (
                    f"{name} holds more than {MAX_RETURNED_VALUES} values; this server, which "
                    "looks at each before the model does, takes no more"
                )
                raise RequestError(message, param=name)


def _values_in(one: object) -> Iterable[object]:
    if isinstance(one, BaseModel):
        return vars(one).values()
    if isinstance(one, dict):
        return one.values()
    return one if isinstance(one, list) else ()


def decode(content: bytes) -> object:
    """Returns the JSON value that `content` spells in UTF-8.

    Raises RequestError for what is no JSON (NaN, a name twice in one object, half a surrogate
    pair, a byte order mark among it) and for more than MAX_DEPTH levels.
    """
    try:
        data = _decode_quickly(content)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        data = _decode_slowly(content)  # which says what is wrong, or takes it
    # Counting is quick, and what opens few lists and objects cannot be deep.
    if content.count(b"[") + content.count(b"{") > MAX_DEPTH and isinstance(data, list | dict):
        _check_depth(data)
    return data


def _decode_quickly(content: bytes) -> object:
    """Returns what most bodies spell, in a fifth of the time. Raises MsgspecError, ValueError or
    RecursionError for all that is wrong, and for some that is right."""
    data = _QUICK.decode(content)
    num_names = _num_names(data, content.count(b"{"))
    # Texts have colons, too; nearly all names end before theirs.
    if num_names < content.count(b":") and (
        num_names < content.count(b'":') or any(space in content for space in _BEFORE_COLONS)
    ):
        raise ValueError("a name may stand twice in one object")
    return data


_BEFORE_COLONS = (b" :", b"\n:", b"\t:", b"\r:")


def _num_names(data: object, most_objects: int) -> int:
    """Returns how many names all objects have together, of which there are `most_objects` or
    fewer: where all are found, long lists need no look."""
    num_names = num_objects = 0
    objects = [data] if isinstance(data, dict) else []
    lists = [data] if isinstance(data, list) else []
    while objects or (lists and num_objects < most_objects):
        inner: Iterable[object]
        if objects:
            found = objects.pop()
            num_names, num_objects = num_names + len(found), num_objects + 1
            inner = found.values()
        else:
            inner = lists.pop()
        for one in inner:
            if isinstance(one, dict):
                objects.append(one)
            elif isinstance(one, list):
                lists.append(one)
    return num_names


def _decode_slowly(content: bytes) -> object:
    """As `decode`, but for the depth."""
    try:
        text = content.decode("utf-8")
        data = _DECODER.decode(text)
    except UnicodeDecodeError as error:
        raise _bad_json(f"byte {error.start} is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise _bad_json(f"{error.msg} at character {error.pos}") from error
    except ValueError as error:
        # Python's own words would be about Python.
        is_long = "integer string conversion" in str(error)
        raise _bad_json("a number has too many digits" if is_long else str(error)) from error
    except RecursionError as error:
        raise _too_deep() from error
    if "\\ud" in text or "\\uD" in text:
        for place in _broken_texts(data, ""):
            message = f"{place or 'the body'} has half a surrogate pair; send valid Unicode"
            raise RequestError(message, code="bad_json", param=place or None)
    return data


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return found


def _no_number(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no JSON number")


_QUICK = msgspec.json.Decoder()
_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_no_number)


def _bad_json(reason: str) -> RequestError:
    return RequestError(f"the body is not valid JSON: {reason}", code="bad_json")


def _too_deep() -> RequestError:
    message = f"the body is nested more than {MAX_DEPTH} levels deep; send less"
    return RequestError(message, code="bad_json")


def _check_depth(data: list[Any] | dict[str, Any]) -> None:
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [one for values in inner for one in values if isinstance(one, list | dict)]
        if not level:
            return
    raise _too_deep()


def _broken_texts(value: object, place: str) -> Iterator[str]:
    """Yields where a text (a name among them) has half a surrogate pair."""
    if isinstance(value, str):
        if not is_unicode(value):
            yield place
    elif isinstance(value, list):
        for index, one in enumerate(value):
            yield from _broken_texts(one, f"{place}[{index}]")
    elif isinstance(value, dict):
        for name, one in value.items():
            if not is_unicode(name):
                yield place
            yield from _broken_texts(one, f"{place}.{name}" if place else name)
