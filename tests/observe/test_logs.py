"""Log lines: JSON objects with extras, errors with tracebacks, uvicorn's loggers included."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from octavo.observe.logs import configure_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("name", ["octavo.server", "uvicorn.error"])
def test_a_json_line_has_the_message_and_the_extras(stream: io.StringIO, name: str) -> None:
    configure_logging("json", "info", stream)
    logging.getLogger(name).info("took %d\nsteps", 3, extra={"seconds": 0.5, "what": object})
    [line] = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "took 3\nsteps"
    assert record["level"] == "info"
    assert record["logger"] == name
    assert record["seconds"] == 0.5
    assert record["time"].endswith("+00:00")
    assert not {"args", "levelno", "msg", "taskName"} & set(record)


def test_a_json_line_carries_the_traceback(stream: io.StringIO) -> None:
    configure_logging("json", "info", stream)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("octavo").exception("failed")
    record = json.loads(stream.getvalue())
    assert "ValueError: broken" in record["error"]


def test_text_lines_are_short_and_the_level_holds(stream: io.StringIO) -> None:
    configure_logging("text", "warning", stream)
    configure_logging("text", "warning", stream)
    logging.getLogger("octavo").info("unseen")
    logging.getLogger("octavo").warning("seen")
    [line] = stream.getvalue().splitlines()
    assert line.endswith("WARNING octavo: seen")
