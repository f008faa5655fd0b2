"""/v1/files over a real socket: uploads to the disk, lists, tenants, and what is no form."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.server import uploads
from octavo.server.store import contents
from tests.no_folder import NOWHERE
from tests.server.conftest import ServerThread, StartServer
from tests.server.fake_engine import FakeEngine
from tests.server.strict_client import client_of, error_of

FORM = {"Content-Type": "multipart/form-data; boundary=cut"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    keys = {"api_key": ("key-a", "key-b"), "max_store_bytes": 40 * 2**20}
    config = ServerConfig(port=0, store_dir=str(folder), shutdown_timeout=1.0, **keys)
    server = ServerThread(FakeEngine(), config)
    yield server.url
    server.end()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url, "key-a") as strict:
        yield strict


def post(url: str, body: bytes, **headers: str) -> httpx.Response:
    known = {"Authorization": "Bearer key-a", **FORM, **headers}
    return httpx.post(f"{url}/v1/files", content=body, headers=known)


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    head = f'--cut\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def test_a_file_goes_up_is_described_and_comes_back(client: openai.OpenAI, folder: Path):
    content = b'{"custom_id": "1"}\n' + os.urandom(3 * 2**20) + b"\r\n--cut"
    file = client.files.create(file=("t\u00e4glich.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose) == (
        len(content),
        "t\u00e4glich.jsonl",
        "batch",
    )
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == content
    assert (folder / "files" / file.id).read_bytes() == content
    assert client.files.delete(file.id).deleted
    assert not (folder / "files" / file.id).exists()
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError):
        client.files.delete(file.id)


def test_files_are_listed_in_pages_by_purpose_and_age(client: openai.OpenAI):
    ids = [client.files.create(file=b"x", purpose="batch").id for _ in range(5)]
    found = [file.id for file in client.files.list(limit=2, order="asc")]
    assert found == ids
    page = client.files.list(limit=2)
    assert ([file.id for file in page.data], page.has_more) == (ids[:-3:-1], True)
    assert [file.id for file in client.files.list(purpose="batch")] == ids[::-1]
    assert client.files.list(purpose="batch_output").data == []
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-nope")
    for id in ids:
        client.files.delete(id)


def test_another_tenants_file_is_not_there(client: openai.OpenAI, url: str):
    file = client.files.create(file=b"mine", purpose="batch")
    with client_of(url, "key-b") as other:
        assert other.files.list().data == []
        for ask in (other.files.retrieve, other.files.content, other.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(file.id)
        with pytest.raises(openai.NotFoundError):
            other.files.list(after=file.id)
    assert client.files.content(file.id).read() == b"mine"
    client.files.delete(file.id)


def test_a_file_expires(client: openai.OpenAI, url: str):
    later = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=b"x", purpose="batch", expires_after=later)  # type: ignore[arg-type]
    assert file.expires_at == file.created_at + 3600
    client.files.delete(file.id)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "vision"}, "purpose"),
        ({"purpose": "batch", "porpoise": "x"}, "porpoise"),
        ({"purpose": "batch", "expires_after[seconds]": "3599"}, "expires_after[seconds]"),
        ({"purpose": "batch", "expires_after[seconds]": "soon"}, "expires_after[seconds]"),
        ({"purpose": "batch", "expires_after[anchor]": "created_at"}, "expires_after[anchor]"),
        ({"purpose": "x" * 2000}, "purpose"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_kept(
    url: str, folder: Path, fields: dict[str, str], param: str
):
    headers = {"Authorization": "Bearer key-a"}
    answer = httpx.post(f"{url}/v1/files", data=fields, files={"file": b"x"}, headers=headers)
    assert error_of(answer, 400)["param"] == param
    assert list((folder / "files").iterdir()) == []


END = b"--cut--\r\n"
FILE = part("file", b"{}", "a")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "ends before its last boundary"),
        (b"no form at all", "not a valid form"),
        (part("purpose", b"batch") + END, "file is missing"),
        (FILE + part("purpose", b"batch"), "ends before its last boundary"),
        (FILE + FILE + END, "'file' is in the form twice"),
        (b"--cut\r\nContent-Disposition: form-data\r\n\r\nx\r\n" + END, "a part has no name"),
        (FILE + part("purpose", b"\xff") + END, "is no UTF-8"),
        (b"".join(part(f"f{i}", b"") for i in range(20)) + END, "more than 16 fields"),
        (b"--cut\r\nX: " + b"y" * 10**5, "form"),
    ],
)
def test_what_is_no_form_is_refused(url: str, folder: Path, body: bytes, words: str):
    assert words in error_of(post(url, body), 400)["message"]
    assert list((folder / "files").iterdir()) == []


def test_json_and_a_form_without_boundary_are_refused(url: str):
    for kind in ("application/json", "multipart/form-data"):
        answer = post(url, b"{}", **{"Content-Type": kind})
        assert error_of(answer, 400)["code"] == "not_multipart"


def test_a_file_that_is_too_large_is_refused_early_and_late(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 10_000)
    body = part("purpose", b"batch") + part("file", bytes(10_001), "a") + END
    assert error_of(post(url, body), 413)["code"] == "body_too_large"  # by its content
    long = part("purpose", b"batch") + part("file", bytes(100_000), "a") + END
    assert error_of(post(url, long), 413)["param"] == "file"  # by its header
    exact = part("purpose", b"batch") + part("file", bytes(10_000), "a") + END
    id = post(url, exact).json()["id"]
    httpx.delete(f"{url}/v1/files/{id}", headers={"Authorization": "Bearer key-a"})
    assert list((folder / "files").iterdir()) == []


def test_a_full_store_refuses_files_and_keeps_what_it_has(client: openai.OpenAI, url: str):
    # A tenant's half of three quarters of 40 MiB.
    kept = client.files.create(file=bytes(14 * 2**20), purpose="batch")
    body = part("purpose", b"batch") + part("file", bytes(2 * 2**20), "a") + END
    refused = error_of(post(url, body), 507)
    assert refused["code"] == "store_full"
    assert "--max-store-bytes" in refused["message"]
    chunked = httpx.post(  # of no announced length
        f"{url}/v1/files",
        content=iter([body]),
        headers={"Authorization": "Bearer key-a", **FORM},
    )
    assert error_of(chunked, 507)["code"] == "store_full"
    assert client.files.retrieve(kept.id) == kept
    client.files.delete(kept.id)
    assert post(url, body).status_code == 200
    for file in client.files.list():
        client.files.delete(file.id)


def test_a_client_that_leaves_leaves_nothing(url: str, folder: Path):
    def endless() -> Iterator[bytes]:
        yield part("purpose", b"batch") + part("file", bytes(300_000), "a")
        raise RuntimeError("the client breaks off")

    with pytest.raises(RuntimeError, match="breaks off"):
        httpx.post(
            f"{url}/v1/files",
            content=endless(),
            headers={"Authorization": "Bearer key-a", **FORM},
        )
    deadline = time.monotonic() + 10
    while list((folder / "files").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_queries_are_checked(url: str):
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order"),
                         ("lmit=3", "lmit")):  # fmt: skip
        answer = httpx.get(f"{url}/v1/files?{query}", headers={"Authorization": "Bearer key-a"})
        assert error_of(answer, 400)["param"] == param


def test_without_a_folder_all_else_is_served(start_server: StartServer):
    server = start_server(store_dir=NOWHERE)
    body = part("purpose", b"batch") + FILE + END
    for answer in (post(server.url, body), httpx.get(f"{server.url}/v1/files")):
        told = error_of(answer, 503)
        assert told["code"] == "store_unavailable"
        assert "--store-dir" in told["message"]
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hello", "max_tokens": 3})
    assert answer.status_code == 200


async def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from octavo.server.errors import ApiError

    files = contents.Contents(tmp_path)
    draft = await files.begin("file-1")
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    draft._file.close()
    draft._file = full  # type: ignore[assignment]
    with pytest.raises(ApiError, match="is full") as error:
        await draft.write([b"x"])
    assert error.value.status == 507
    await draft.close()
    assert list((tmp_path / "files").iterdir()) == []


async def test_too_many_uploads_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from octavo.errors import OverloadedError

    monkeypatch.setattr(contents, "MAX_DRAFTS", 2)
    files = contents.Contents(tmp_path)
    drafts = [await files.begin(f"file-{i}") for i in range(2)]
    with pytest.raises(OverloadedError):
        await files.begin("file-3")
    await asyncio.gather(*(draft.close() for draft in drafts))
    last = await files.begin("file-3")
    await last.close()
