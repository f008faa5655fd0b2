"""Ended spans on their way to a collector: a bounded queue, a thread, and what became of them.

Made by `tracing.tracer`. A collector that is slow or gone costs spans, which are counted, and
nothing else: whoever ends a span never waits.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

MAX_WAITING = 8192
"""Spans: those of about a thousand requests."""
MAX_BATCH = 512
_PERIOD_SECONDS = 1.0
_CLOSE_SECONDS = 3.0


class SpanQueue(SpanProcessor):
    """A processor of the SDK's that counts what it loses."""

    def __init__(
        self,
        exporter: SpanExporter,
        max_waiting: int = MAX_WAITING,
        period_seconds: float = _PERIOD_SECONDS,
    ) -> None:
        """Spans are sent every `period_seconds`, or when there are MAX_BATCH."""
        self._exporter = exporter
        self._max_waiting = max_waiting
        self._period = period_seconds
        self._waiting: deque[ReadableSpan] = deque()
        self._wake = threading.Event()
        self._is_closed = False
        self._was_failing = False
        self._num_exported = self._num_dropped = self._num_failed = 0
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> Mapping[str, int]:
        """Spans by what became of them: exported; dropped, as too many waited; failed, as no
        collector took them."""
        return {
            "exported": self._num_exported,
            "dropped": self._num_dropped,
            "failed": self._num_failed,
        }

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing to do."""

    def on_end(self, span: ReadableSpan) -> None:
        if len(self._waiting) >= self._max_waiting or self._is_closed:
            self._num_dropped += 1
            return
        self._waiting.append(span)
        if len(self._waiting) >= MAX_BATCH:
            self._wake.set()

    def _run(self) -> None:
        while not self._is_closed or self._waiting:
            if not self._is_closed and len(self._waiting) < MAX_BATCH:
                self._wake.wait(self._period)
                self._wake.clear()
            self._export()

    def _export(self) -> None:
        count = min(len(self._waiting), MAX_BATCH)
        batch = [self._waiting.popleft() for _ in range(count)]
        if not batch:
            return
        try:
            is_done = self._exporter.export(batch) is SpanExportResult.SUCCESS
        except Exception:  # the edge of the thread: exporters raise what their libraries raise
            logger.debug("spans were not exported", exc_info=True)
            is_done = False
        if is_done:
            self._num_exported += count
        else:
            self._num_failed += count
        if is_done == self._was_failing:  # it has changed
            self._was_failing = not is_done
            if is_done:
                logger.info("the collector of traces takes spans again")
            else:
                logger.warning("the collector of traces takes no spans; they are lost and counted")

    def shutdown(self) -> None:
        """Sends what waits, for a few seconds at most. May be called twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._wake.set()
        self._thread.join(_CLOSE_SECONDS)
        self._num_dropped += len(self._waiting)
        self._waiting.clear()
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        self._wake.set()
        return True
