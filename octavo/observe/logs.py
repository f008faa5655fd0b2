"""Log lines as text for people or as one JSON object a line for machines, without waiting.

Called once by the commands before anything else logs; covers uvicorn's loggers too. A process whose
standard error is a log (`owns_stderr`) has everything that Python writes there go the same way.
"""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

from octavo.observe.log_writer import LogWriter

LogFormat = Literal["text", "json"]

FLUSH_SECONDS = 1.0
"""How long the end of a process waits for whoever reads its log."""
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}
_NOISY = ("httpx", "httpcore", "urllib3", "filelock", "uvicorn", "uvicorn.error", "asyncio")
"""Their lines about every connection are of no use to an operator."""
_BLAMING = ("python_multipart",)
"""They warn of mistakes of clients, who are answered."""


class JsonFormatter(logging.Formatter):
    """time, level, logger, message, the record's extras, and `error` with the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in record.__dict__.items():
            if name not in _STANDARD and name not in line:
                line[name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time of day, level, logger, message."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%H:%M:%S")
        self._newest = (0, "")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Returns the time of day, which is worked out once a second."""
        second, text = self._newest
        if second != int(record.created):
            text = super().formatTime(record, datefmt)
            self._newest = (int(record.created), text)
        return text


class QueuedHandler(logging.Handler):
    """Formats at once and leaves the writing to a LogWriter."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.writer = LogWriter(descriptor, self._tell_dropped)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.put(self.format(record) + "\n")
        except Exception:  # the edge: a line that cannot be formatted must not end a request
            self.handleError(record)

    def flush(self) -> None:
        self.writer.flush(FLUSH_SECONDS)

    def close(self) -> None:
        self.writer.close(FLUSH_SECONDS)
        super().close()

    def _tell_dropped(self, num_lines: int) -> str:
        message = f"{num_lines} log lines were dropped: nobody read them in time"
        record = logging.LogRecord(__name__, logging.WARNING, "", 0, message, None, None)
        return self.format(record) + "\n"


class QueuedStream(io.TextIOBase):
    """Standard error of a process that logs there: text as it comes, or JSON line by line."""

    def __init__(self, handler: QueuedHandler, under: TextIO, is_json: bool) -> None:
        self._handler = handler
        self._under = under
        self._is_json = is_json
        self._begun = ""

    def write(self, text: str, /) -> int:
        if not self._is_json:
            self._begun += text
            if "\n" in text:
                self.flush()
            return len(text)
        *lines, begun = (self._begun + text).split("\n")
        self._begun = begun.rpartition("\r")[2]  # a progress bar overwrites itself
        for line in lines:
            line = line.rpartition("\r")[2]
            if line.strip():
                record = logging.LogRecord("stderr", logging.INFO, "", 0, line, None, None)
                self._handler.emit(record)
        return len(text)

    def flush(self) -> None:
        if self._begun and not self._is_json:
            text, self._begun = self._begun, ""
            self._handler.writer.put(text)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return self._under.isatty()

    def fileno(self) -> int:
        return self._under.fileno()


def configure_logging(
    format: LogFormat, level: str, stream: TextIO | None = None, *, owns_stderr: bool = False
) -> None:
    """Sends all log lines of `level` and above to `stream` (standard error) in `format`.

    Standard error is never waited for; another stream is the caller's own.
    """
    handler = logging.StreamHandler(stream) if stream else _stderr_handler()
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    handler.addFilter(_rename)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        if isinstance(old, QueuedHandler):
            old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # No format of ours tells of them, and finding them out costs a third of a line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    for name in _NOISY:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    for name in _BLAMING:
        logging.getLogger(name).setLevel(logging.ERROR)
    if owns_stderr and isinstance(handler, QueuedHandler):
        logging.captureWarnings(True)
        sys.stderr = QueuedStream(handler, sys.stderr, format == "json")


def num_dropped_lines() -> int:
    """Returns how many lines of this process nobody read in time."""
    handlers = logging.getLogger().handlers
    return sum(one.writer.num_dropped for one in handlers if isinstance(one, QueuedHandler))


def _stderr_handler() -> logging.Handler:
    try:
        return QueuedHandler(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # a stand-in without a descriptor
        return logging.StreamHandler(sys.stderr)


def _rename(record: logging.LogRecord) -> bool:
    """Uvicorn logs whatever it says as `uvicorn.error`, which reads as an error."""
    if record.name.startswith("uvicorn"):
        record.name = "octavo.server"
    return True
