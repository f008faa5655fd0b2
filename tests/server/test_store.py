"""The store under its own interface: tenants, bounds, many processes, and whatever disks do."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.config import ServerConfig
from octavo.errors import OverloadedError
from octavo.server.errors import ApiError
from octavo.server.store import bounds as bounds_module
from octavo.server.store import database
from octavo.server.store.bounds import Amount, Bounds, Kind, Pool
from octavo.server.store.objects import Part, used
from octavo.server.store.store import Store
from tests.no_folder import NOWHERE


def new_store(folder: Path | str, **options: object) -> Store:
    return Store(ServerConfig(store_dir=str(folder), **options))  # type: ignore[arg-type]


async def test_an_object_is_its_tenants_alone(tmp_path: Path):
    store = new_store(tmp_path)
    await store.put(Kind.RESPONSE, "a", "r1", b"of a")
    await store.put(Kind.RESPONSE, "b", "r1", b"of b")
    assert await store.get(Kind.RESPONSE, "a", "r1") == b"of a"
    assert await store.get(Kind.RESPONSE, "b", "r1") == b"of b"
    assert await store.get(Kind.RESPONSE, "c", "r1") is None
    assert await store.get(Kind.FILE, "a", "r1") is None
    assert not await store.delete(Kind.RESPONSE, "c", "r1")
    assert await store.update(Kind.RESPONSE, "c", "r1", lambda body: b"x") is None
    assert await store.list(Kind.RESPONSE, "a", Part(limit=5, after="r2")) is None
    assert await store.delete(Kind.RESPONSE, "a", "r1")
    assert await store.get(Kind.RESPONSE, "a", "r1") is None
    assert await store.get(Kind.RESPONSE, "b", "r1") == b"of b"
    await store.close()


async def test_objects_outlive_the_server_and_are_private(tmp_path: Path):
    first = new_store(tmp_path / "deep" / "store")
    await first.put(Kind.FILE, "", "f", b"body")
    await first.put(Kind.FILE, "", "f", b"a new body")
    await first.close()
    second = new_store(tmp_path / "deep" / "store")
    assert await second.get(Kind.FILE, "", "f") == b"a new body"
    assert os.stat(tmp_path / "deep" / "store").st_mode & 0o777 == 0o700
    await second.close()


async def test_lists_come_in_pages_both_ways(tmp_path: Path):
    store = new_store(tmp_path)
    for i in range(5):
        await store.put(Kind.BATCH, "t", f"b{i}", b"%d" % i)
        await store.put(Kind.BATCH, "other", f"x{i}", b"")
    for newest_first, wanted in ((True, [4, 3, 2, 1, 0]), (False, [0, 1, 2, 3, 4])):
        found, after, more = [], None, True
        while more:
            part = Part(limit=2, after=after, newest_first=newest_first)
            page = await store.list(Kind.BATCH, "t", part)
            assert page is not None
            found += [int(body) for _, body in page.objects]
            after, more = page.objects[-1][0], page.has_more
        assert found == wanted
    await store.close()


async def test_what_expires_is_gone(tmp_path: Path):
    now = [1000.0]
    store = Store(ServerConfig(store_dir=str(tmp_path)), clock=lambda: now[0])
    await store.put(Kind.FILE, "", "f", b"", expires_at=1010)
    assert await store.get(Kind.FILE, "", "f") == b""
    now[0] = 1010.0
    assert await store.get(Kind.FILE, "", "f") is None
    page = await store.list(Kind.FILE, "", Part(limit=5))
    assert page is not None
    assert page.objects == []
    await store.close()


async def test_changes_from_several_stores_never_overwrite_each_other(tmp_path: Path):
    stores = [new_store(tmp_path) for _ in range(3)]
    await stores[0].put(Kind.BATCH, "", "b", b"0")

    async def count(store: Store) -> None:
        for _ in range(20):
            await store.update(Kind.BATCH, "", "b", lambda body: b"%d" % (int(body) + 1))

    await asyncio.gather(*map(count, stores))
    assert await stores[0].get(Kind.BATCH, "", "b") == b"60"
    for store in stores:
        await store.close()


async def test_a_store_opens_while_others_write(tmp_path: Path):
    writer, is_over = new_store(tmp_path), asyncio.Event()
    await writer.put(Kind.BATCH, "", "b", b"0")

    async def write() -> None:
        while not is_over.is_set():
            await writer.update(Kind.BATCH, "", "b", lambda body: body)

    writing = asyncio.ensure_future(write())
    for _ in range(100):
        store = new_store(tmp_path)
        assert await store.get(Kind.BATCH, "", "b") == b"0"
        await store.close()
    is_over.set()
    await writing
    await writer.close()


async def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path):
    store = new_store(tmp_path)

    def work(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO batch_lines VALUES ('b', 1, '', 0, x'00')")
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        await store.run(work)
    lines = await store.run(lambda db: db.execute("SELECT * FROM batch_lines").fetchall())
    assert lines == []
    await store.close()


async def test_oldest_responses_make_room_and_files_are_refused(tmp_path: Path):
    store = new_store(tmp_path, max_store_bytes=4000, api_key=("a", "b"))
    for i in range(10):  # a tenant's half of a quarter is 500 bytes
        await store.put(Kind.RESPONSE, "a", f"r{i}", bytes(100))
    page = await store.list(Kind.RESPONSE, "a", Part(limit=20))
    assert page is not None
    assert [id for id, _ in page.objects] == ["r9", "r8", "r7", "r6", "r5"]
    with pytest.raises(ApiError, match=r"limit is .* 500 bytes.*--max-store-bytes") as refused:
        await store.put(Kind.RESPONSE, "a", "large", bytes(501))
    assert refused.value.status == 507
    assert await store.get(Kind.RESPONSE, "a", "r5") is not None
    for i in range(15):  # half of three quarters is 1,500 bytes
        await store.put(Kind.FILE, "a", f"f{i}", bytes(100))
    with pytest.raises(ApiError, match="delete what is not needed") as refused:
        await store.put(Kind.FILE, "a", "f15", b"x")
    assert refused.value.status == 507
    await store.put(Kind.FILE, "b", "f", bytes(1500))  # the other tenant has its own
    await store.delete(Kind.FILE, "a", "f3")
    await store.put(Kind.BATCH, "a", "b", bytes(100))
    await store.close()


async def test_the_tenant_with_most_makes_room_for_all(tmp_path: Path):
    store = new_store(tmp_path, max_store_bytes=4000, api_key=("a", "b", "c"))
    for tenant, count in (("a", 5), ("b", 3), ("c", 3)):
        for i in range(count):
            await store.put(Kind.RESPONSE, tenant, f"r{i}", bytes(100))
    kept = {}
    for tenant in "abc":
        page = await store.list(Kind.RESPONSE, tenant, Part(limit=9, newest_first=False))
        assert page is not None
        kept[tenant] = [id for id, _ in page.objects]
    assert kept == {"a": ["r1", "r2", "r3", "r4"], "b": ["r0", "r1", "r2"], "c": ["r0", "r1", "r2"]}
    await store.close()


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "delete", "update"]),
            st.sampled_from(["a", "b"]),
            st.integers(0, 4),
            st.integers(0, 300),
        ),
        max_size=40,
    )
)
def test_usage_is_what_is_stored_and_the_oldest_went(steps: list[tuple[str, str, int, int]]):
    asyncio.run(_drive(steps))


async def _drive(steps: list[tuple[str, str, int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        store = new_store(folder, max_store_bytes=2400, api_key=("a", "b"))
        kept: dict[str, OrderedDict[str, int]] = {"a": OrderedDict(), "b": OrderedDict()}
        for step, tenant, number, size in steps:
            own, name = kept[tenant], f"r{number}"
            if step == "put":
                await store.put(Kind.RESPONSE, tenant, name, bytes(size))
                own.pop(name, None)
                while sum(own.values()) + size > 300:
                    own.popitem(last=False)
                own[name] = size
            elif step == "delete":
                assert await store.delete(Kind.RESPONSE, tenant, name) == (name in own)
                own.pop(name, None)
            elif size <= own.get(name, 0):
                shorter = bytes(size)
                changed = await store.update(Kind.RESPONSE, tenant, name, lambda _, s=shorter: s)
                assert changed == (shorter if name in own else None)
                if name in own:
                    own[name] = size
        for tenant, own in kept.items():
            page = await store.list(Kind.RESPONSE, tenant, Part(limit=9, newest_first=False))
            assert page is not None
            assert [(id, len(body)) for id, body in page.objects] == list(own.items())
            amount = await store.run(lambda db, t=tenant: used(db, Pool.PASSING, t))
            assert amount == Amount(len(own), sum(own.values()))
        await store.close()


async def test_counts_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bounds_module, "MAX_RESPONSES", 3)
    store = new_store(tmp_path)
    for i in range(5):
        await store.put(Kind.RESPONSE, "", f"r{i}", b"")
    page = await store.list(Kind.RESPONSE, "", Part(limit=9))
    assert page is not None
    assert [id for id, _ in page.objects] == ["r4", "r3", "r2"]
    await store.close()


def test_one_tenant_may_take_all_and_several_half_each():
    assert Bounds(400, 1).of_tenant(Pool.PASSING).num_bytes == 100
    assert Bounds(400, 2).of_tenant(Pool.PASSING).num_bytes == 50
    assert Bounds(400, 0).of_tenant(Pool.KEPT).num_bytes == 300


async def test_a_folder_that_cannot_be_written_is_told_with_a_way_out(
    caplog: pytest.LogCaptureFixture,
):
    store = new_store(NOWHERE)
    await store.check()
    assert "cannot be stored: the store in /proc/nope cannot be used" in caplog.text
    with pytest.raises(ApiError, match="start the server with a --store-dir") as error:
        await store.get(Kind.RESPONSE, "", "r")
    assert (error.value.status, error.value.code) == (503, "store_unavailable")
    await store.close()


async def test_a_file_that_is_no_store_is_told(tmp_path: Path):
    (tmp_path / database.FILE).write_bytes(b"no database at all, " * 100)
    store = new_store(tmp_path)
    with pytest.raises(ApiError, match="cannot be used: file is not a database") as error:
        await store.get(Kind.RESPONSE, "", "r")
    assert error.value.status == 503
    await store.close()


async def test_a_store_of_a_later_version_is_left_alone(tmp_path: Path):
    with sqlite3.connect(tmp_path / database.FILE) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    store = new_store(tmp_path)
    with pytest.raises(ApiError, match="written by a later version"):
        await store.get(Kind.RESPONSE, "", "r")
    await store.close()


async def test_a_full_disk_is_told_and_nothing_is_lost(tmp_path: Path):
    store = new_store(tmp_path)
    await store.put(Kind.RESPONSE, "", "r", b"kept")
    connection = store._database._connection
    assert connection is not None
    [pages] = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    with pytest.raises(ApiError, match="is full; free some of it") as error:
        await store.put(Kind.RESPONSE, "", "large", bytes(10**6))
    assert (error.value.status, error.value.code) == (507, "store_full")
    assert await store.get(Kind.RESPONSE, "", "r") == b"kept"
    assert await store.get(Kind.RESPONSE, "", "large") is None
    await store.close()


async def test_a_store_without_bytes_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = new_store(tmp_path / "none", max_store_bytes=0)
    await store.check()
    with pytest.raises(ApiError, match="--max-store-bytes above 0"):
        await store.get(Kind.RESPONSE, "", "r")
    assert not (tmp_path / "none").exists()
    assert not caplog.text
    await store.close()


async def test_too_many_calls_are_refused_not_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(database, "MAX_WAITING", 4)
    store = new_store(tmp_path)
    asked = [store.get(Kind.RESPONSE, "", "r") for _ in range(8)]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert found[:4] == [None] * 4
    assert all(isinstance(one, OverloadedError) for one in found[4:])
    assert await store.get(Kind.RESPONSE, "", "r") is None
    await store.close()


def test_kill_9_loses_nothing_that_was_confirmed(tmp_path: Path):
    script = f"""
        import asyncio, sys
        from octavo.config import ServerConfig
        from octavo.server.store.bounds import Kind
        from octavo.server.store.store import Store
        async def main():
            store = Store(ServerConfig(store_dir={str(tmp_path)!r}))
            for i in range(10**6):
                await store.put(Kind.RESPONSE, "", f"r{{i}}", b"x" * 1000)
                print(i, flush=True)
        asyncio.run(main())
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    last = 0
    for line in process.stdout:
        if (last := int(line)) >= 50:
            process.send_signal(signal.SIGKILL)
            break
    rest = process.communicate()[0].split()
    last = max([last, *map(int, rest)])

    async def read() -> None:
        store = new_store(tmp_path)
        for i in range(last + 1):
            assert await store.get(Kind.RESPONSE, "", f"r{i}") == b"x" * 1000
        await store.close()

    asyncio.run(read())
