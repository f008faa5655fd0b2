"""A file of requests without a server: each line through the code of its route, its result written.

Called by the command `run-batch`. Results stand in the order of lines, and each is written as soon
as those before it are; nothing is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from octavo.server.batches import outputs
from octavo.server.batches.calls import LineCalls
from octavo.server.batches.lines import MAX_BESIDES_BYTES, Line, LineReader, Repetitions
from octavo.server.batches.records import LineResult
from octavo.server.state import ServerState
from octavo.server.tenants.callers import NOBODY

MAX_AHEAD = 4096
"""Lines that are done before one that is not: their results are in memory."""


@dataclass(slots=True)
class Progress:
    """Lines so far."""

    done: int = 0
    failed: int = 0
    """Of those that are done."""


class FileRun:
    """One input file and its output. Use it once."""

    def __init__(
        self,
        state: ServerState,
        output: BinaryIO,
        batch_id: str,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        """`tell` is called whenever a line is done."""
        self._state = state
        self._calls = LineCalls(state)
        self._output = output
        self._id = batch_id
        self._tell = tell
        self._progress = Progress()
        engine = state.engine
        # As many run as the engine takes at once, and as many wait, so that none of its rows does.
        most = max(1, min(2 * engine.max_num_seqs, engine.max_num_queued_requests // 2))
        self._room = asyncio.Semaphore(most)
        self._ahead = asyncio.Semaphore(MAX_AHEAD)
        self._order: list[int] = []
        """Numbers of lines that are begun and not written."""
        self._results: dict[int, LineResult] = {}

    async def run(self, path: Path) -> Progress:
        """Runs all lines. Raises OSError, EngineDeadError."""
        limit = self._state.body_room.max_body_bytes + MAX_BESIDES_BYTES
        reader = LineReader(path, tuple(self._state.batch_handlers), limit)
        repetitions = Repetitions()
        try:
            async with asyncio.TaskGroup() as running:
                while (lines := await asyncio.to_thread(reader.next)) is not None:
                    for line in repetitions.checked(lines):
                        await self._ahead.acquire()
                        self._order.append(line.number)
                        if line.error is not None:
                            self._keep(outputs.refused(self._id, line, line.error))
                            continue
                        await self._room.acquire()
                        running.create_task(self._run_line(line))
        finally:
            reader.close()
        return self._progress

    async def _run_line(self, line: Line) -> None:
        id = outputs.request_id(self._id, line.number)
        try:
            answer = await self._calls.run_patiently(NOBODY.id, line.url, line.body, id)
        finally:
            self._room.release()
        self._keep(outputs.answered(self._id, line, answer))

    def _keep(self, result: LineResult) -> None:
        """Writes a result, and those behind it that are done, as soon as it is its turn."""
        self._progress.done += 1
        self._progress.failed += result.is_error
        self._results[result.line] = result
        num_written = 0
        for number in self._order:
            found = self._results.pop(number, None)
            if found is None:
                break
            self._output.write(found.body + b"\n")
            num_written += 1
        del self._order[:num_written]
        for _ in range(num_written):
            self._ahead.release()
        self._tell(self._progress)
