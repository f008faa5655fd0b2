"""What lines come to, as lines of JSON; and the two files that a batch ends with.

Called by `worker`. Files are written in pieces, from the store to the disk.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import msgspec

from octavo.errors import RequestError
from octavo.server.batches import records
from octavo.server.batches.calls import Answer
from octavo.server.batches.lines import Line
from octavo.server.batches.records import Batch, LineResult
from octavo.server.store.contents import Draft
from octavo.server.store.files import StoredFile
from octavo.server.store.store import Store

READ_AT_ONCE = 16
"""Results, each as long as an answer."""


def request_id(batch_id: str, line: int) -> str:
    """Returns the id of a line's request: the same however often it is run."""
    return f"{batch_id.replace('batch_', 'batch_req_', 1)}_{line}"


def answered(batch_id: str, line: Line, answer: Answer) -> LineResult:
    """Returns the result of a line that its route answered, well or by an error."""
    id = request_id(batch_id, line.number)
    response = {
        "status_code": answer.status,
        "request_id": id,
        "body": msgspec.Raw(answer.body),
    }
    return _result(id, line, answer.status != 200, {"response": response, "error": None})


def refused(batch_id: str, line: Line, error: RequestError) -> LineResult:
    """Returns the result of a line that was not run."""
    told = {
        "code": error.code or "invalid_value",
        "message": str(error),
        "param": error.param,
        "line": line.number,
    }
    id = request_id(batch_id, line.number)
    return _result(id, line, True, {"response": None, "error": told})


def _result(id: str, line: Line, is_error: bool, told: dict[str, Any]) -> LineResult:
    body = msgspec.json.encode({"id": id, "custom_id": line.custom_id, **told})
    return LineResult(line=line.number, is_error=is_error, body=body)


async def write_files(store: Store, batch: Batch) -> list[StoredFile]:
    """Writes the results so far into a file of answers and one of errors, in the order of lines;
    returns those that are not empty. May be done again: the names are the same.

    Raises ApiError, OverloadedError.
    """
    async with AsyncExitStack() as drafts:
        opened: dict[bool, Draft] = {}
        line = 0
        while found := await store.run(
            lambda db, after=line: records.results_after(db, batch.id, after, READ_AT_ONCE)
        ):
            for is_error in (False, True):
                pieces = [one.body + b"\n" for one in found if one.is_error == is_error]
                if pieces and is_error not in opened:
                    opened[is_error] = draft = await store.contents.begin(_file_id(batch, is_error))
                    drafts.push_async_callback(draft.close)
                if pieces:
                    await opened[is_error].write(pieces)
            line = found[-1].line
        for draft in opened.values():
            await draft.finish()
    return [_file(store, batch, is_error, draft) for is_error, draft in opened.items()]


def _file_id(batch: Batch, is_error: bool) -> str:
    return f"file-{batch.id.removeprefix('batch_')}-{'errors' if is_error else 'output'}"


def _file(store: Store, batch: Batch, is_error: bool, draft: Draft) -> StoredFile:
    now, seconds = int(store.clock()), batch.output_expiry_seconds
    return StoredFile(
        id=_file_id(batch, is_error),
        bytes=draft.num_bytes,
        created_at=now,
        filename=f"{batch.id}_{'errors' if is_error else 'output'}.jsonl",
        purpose="batch_output",
        expires_at=None if seconds is None else now + seconds,
    )
