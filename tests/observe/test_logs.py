"""Log lines: JSON objects with extras, errors with tracebacks, uvicorn's loggers included."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
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


@pytest.mark.parametrize("name", ["octavo.server", "uvicorn.error", "uvicorn.access"])
def test_a_json_line_has_the_message_and_the_extras(stream: io.StringIO, name: str) -> None:
    configure_logging("json", "info", stream)
    logging.getLogger(name).warning("took %d\nsteps", 3, extra={"seconds": 0.5, "what": object})
    [line] = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record["message"] == "took 3\nsteps"
    assert record["level"] == "warning"
    assert record["logger"] == "octavo.server"
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


def test_what_python_writes_to_standard_error_is_json_too() -> None:
    script = """
import logging, sys, warnings
from octavo.observe.logs import configure_logging
configure_logging("json", "info", owns_stderr=True)
print("two\\nlines", file=sys.stderr)
for done in range(3):
    print(f"\\r{done}", end="", file=sys.stderr)
print(file=sys.stderr)
warnings.warn("old")
logging.getLogger("uvicorn.error").warning("w")
raise ValueError("broken")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    records = [json.loads(line) for line in done.stderr.splitlines()]
    messages = [record["message"] for record in records]
    assert messages[:3] == ["two", "lines", "2"]
    assert "old" in messages[3]
    assert messages[-1] == "ValueError: broken"
    assert {record["logger"] for record in records} == {"stderr", "py.warnings", "octavo.server"}


FLOOD = """
import logging, sys, threading, time
from octavo.observe.logs import configure_logging, num_dropped_lines
configure_logging("text", "info", owns_stderr=True)
logger = logging.getLogger("octavo")
began = time.monotonic()
for number in range(30_000):
    logger.info("line %d of a log that nobody reads", number)
print("and more", file=sys.stderr)
print(num_dropped_lines(), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("is_read_later", [False, True])
def test_a_log_that_nobody_reads_holds_up_nothing(is_read_later: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FLOOD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        num_dropped = int(process.stdout.readline())
        assert 10_000 < num_dropped < 21_000
        process.stdin.write("\n")
        process.stdin.close()
        if is_read_later:
            lines = process.stderr.read().splitlines()
            told = [line for line in lines if "lines were dropped" in line]
            assert sum(int(line.split("logs: ")[1].split()[0]) for line in told) == num_dropped
            assert len(lines) - len(told) + num_dropped == 30_001
        assert process.wait(20) == 0


def test_a_log_whose_reader_is_gone_harms_nobody() -> None:
    script = FLOOD.replace("sys.stdin.readline()", "")
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        process.stderr.close()
        assert process.wait(20) == 0
