"""POST, GET and DELETE of /v1/files: what clients upload for batches, and what batches came to.

Contents go to and from the disk in pieces. A file is its tenant's: to all others it does not exist.
"""

from __future__ import annotations

import secrets

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from octavo.errors import RequestError, shown
from octavo.server.errors import ApiError
from octavo.server.lists import listed
from octavo.server.openapi import BYTES, described
from octavo.server.protocol.files import ANCHOR, FilesQuery, UploadFields
from octavo.server.query import parse_texts, read_query
from octavo.server.state import server_state
from octavo.server.store import files
from octavo.server.store.bounds import Amount, Kind
from octavo.server.store.objects import Name, Part, make_room
from octavo.server.store.store import Store
from octavo.server.streaming import json_response
from octavo.server.tenants.callers import tenant_of
from octavo.server.uploads import check_length, received

router = APIRouter(tags=["Files"])


@router.post("/v1/files", **described("File", form=UploadFields, statuses=(507,)))
async def upload_file(request: Request) -> Response:
    """Stores a file of requests (JSON lines), sent as a form."""
    store, tenant = server_state(request).store, tenant_of(request)
    # Before all of it has come only to be refused.
    announced = Amount(1, check_length(request))
    await store.run(lambda db: make_room(db, store.bounds, Kind.FILE.pool, tenant, announced))
    id = f"file-{secrets.token_hex(12)}"
    async with received(request, store.contents, id) as upload:
        fields = parse_texts(UploadFields, upload.form.fields)
        seconds = fields.expires_after_seconds
        if fields.expires_after_anchor is not None and seconds is None:
            message = f"{ANCHOR} needs expires_after[seconds], or none of them"
            raise RequestError(message, param=ANCHOR)
        now = int(store.clock())
        file = files.StoredFile(
            id=id,
            bytes=upload.draft.num_bytes,
            created_at=now,
            expires_at=None if seconds is None else now + seconds,
            filename=upload.form.filename or "file",
            purpose=fields.purpose,
        )
        await upload.draft.finish()
        try:
            await store.run(lambda db: files.put(db, store.bounds, tenant, file))
        except BaseException:
            await store.contents.remove(id)
            raise
    return json_response(file.answer())


@router.get("/v1/files", **described("Files", query=FilesQuery, statuses=(400, 404)))
async def list_files(request: Request) -> Response:
    """Lists files, the newest first."""
    query = read_query(request, FilesQuery)
    part = Part(
        limit=query.limit,
        after=query.after,
        newest_first=query.order == "desc",
        field=None if query.purpose is None else ("purpose", query.purpose),
    )
    store = server_state(request).store
    page = await store.list(Kind.FILE, tenant_of(request), part)
    if page is None:
        raise _no_file(query.after or "", "after")
    found = [files.decode(body).answer() for _, body in page.objects]
    return json_response(listed(found, page.has_more))


@router.get("/v1/files/{file_id}", **described("File", statuses=(404,)))
async def retrieve_file(request: Request, file_id: str) -> Response:
    """Describes one file."""
    file = await _file(server_state(request).store, tenant_of(request), file_id)
    return json_response(file.answer())


@router.get("/v1/files/{file_id}/content", **described(BYTES, statuses=(404,)))
async def retrieve_file_content(request: Request, file_id: str) -> Response:
    """Returns the bytes of one file."""
    store = server_state(request).store
    file = await _file(store, tenant_of(request), file_id)
    path = store.contents.path(file.id)
    stat = await store.contents.in_thread(path.stat)
    return FileResponse(path, media_type=BYTES, filename=file.filename, stat_result=stat)


@router.delete("/v1/files/{file_id}", **described("FileDeleted", statuses=(404, 409)))
async def delete_file(request: Request, file_id: str) -> Response:
    """Removes one file; not one (409) that a batch still reads."""
    store, tenant = server_state(request).store, tenant_of(request)
    now = store.clock()
    name = Name(kind=Kind.FILE, tenant=tenant, id=file_id)
    if not await store.run(lambda db: files.delete(db, name, now)):
        raise _no_file(file_id)
    await store.contents.remove(file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


async def _file(store: Store, tenant: str, id: str) -> files.StoredFile:
    body = await store.get(Kind.FILE, tenant, id)
    if body is None:
        raise _no_file(id)
    return files.decode(body)


def _no_file(id: str, param: str = "file_id") -> ApiError:
    message = f"there is no file {shown(id)}; GET /v1/files lists yours"
    return ApiError(404, message, code="file_not_found", param=param)
