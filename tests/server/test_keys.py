"""Keys of a file: what each may do on every route, whose it is, and what becomes of a change."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from octavo.cli import main
from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.app import FAMILIES
from octavo.server.tenants import key_file as key_file_module
from octavo.server.tenants import route_scopes
from octavo.server.tenants.callers import ALL_SCOPES, Scope
from octavo.server.tenants.key_file import KeyRow, hash_of, key_file, read_key_file, with_key
from octavo.server.tenants.keyring import Keyring
from octavo.server.tenants.route_scopes import ROUTE_SCOPES, check, paths_of
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine

JSON = {"Content-Type": "application/json"}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
KEYS = {scope.value: f"key-that-may-{scope}" for scope in Scope}
"""A key for each scope, and one scope each."""


def rows() -> dict[str, Any]:
    return {
        "keys": [
            {"name": name, "hash": hash_of(key), "scopes": [name]} for name, key in KEYS.items()
        ]
    }


def bearer(key: str) -> dict[str, str]:
    return {**JSON, "Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    file.write_text(json.dumps(rows()))
    store = str(tmp_path_factory.mktemp("store"))
    config = ServerConfig(port=0, keys=str(file), store_dir=store, shutdown_timeout=1.0)
    thread = ServerThread(FakeEngine(), config)
    yield thread
    thread.end()


def app_paths(server: Any) -> set[str]:
    return paths_of(server.server.config.app, [family.router for family in FAMILIES])


def test_every_route_of_the_app_is_in_the_table_and_no_other(server: Any) -> None:
    assert app_paths(server) == set(ROUTE_SCOPES)


def test_an_app_with_a_route_that_no_scope_guards_does_not_start() -> None:
    app, router = FastAPI(), APIRouter()
    router.add_api_route("/v1/new", lambda: None)
    app.include_router(router)
    assert "/v1/new" in paths_of(app, [router])
    with pytest.raises(RuntimeError, match="/v1/new"):
        check(["/health", "/v1/new"])
    with pytest.raises(RuntimeError, match="neither"):
        paths_of(app, [])


def test_every_method_of_every_route_asks_for_a_scope_of_the_table(server: Any) -> None:
    with httpx.Client(base_url=server.url) as http:
        for template in app_paths(server):
            needed = ROUTE_SCOPES[template]
            path = template.replace("{model_id:path}", "fake")
            path = path.replace("{response_id}", "x").replace("{file_id}", "x")
            path = path.replace("{batch_id}", "x")
            for method in METHODS:
                stranger = http.request(method, path, headers=JSON)
                assert (stranger.status_code == 401) == bool(needed), (method, path)
                for name, key in KEYS.items():
                    status = http.request(method, path, headers=bearer(key)).status_code
                    is_let_in = not needed or Scope(name) in needed
                    assert (status not in (401, 403)) == is_let_in, (method, path, name)
                    assert is_let_in or status == 403, (method, path, name)


@pytest.mark.parametrize(
    "path", ["/metrics%0A", "/metrics/", "//metrics", "/%6Detrics", "/v1/../metrics", "/metrics?a"]
)
def test_no_spelling_of_a_path_goes_round_the_table(server: Any, path: str) -> None:
    url = httpx.URL(server.url).copy_with(raw_path=path.encode())
    answer = httpx.get(url, headers=bearer(KEYS["generate"]))
    assert answer.status_code in (403, 404)
    assert "octavo:" not in answer.text
    assert httpx.get(url).status_code == 401


def test_a_refusal_names_the_scope_in_the_form_of_its_route(server: Any) -> None:
    refused = httpx.post(f"{server.url}/v1/embeddings", headers=bearer(KEYS["generate"]))
    assert refused.json()["error"]["code"] == "missing_scope"
    assert "embed" in refused.json()["error"]["message"]
    refused = httpx.post(f"{server.url}/v1/messages", headers=bearer(KEYS["embed"]))
    assert refused.json()["error"]["type"] == "permission_error"
    refused = httpx.get(f"{server.url}/metrics", headers=bearer(KEYS["operate"]))
    assert refused.json()["error"]["code"] == "operator_only"


def test_a_batch_is_for_routes_that_its_key_may_use(server: Any) -> None:
    body = {"input_file_id": "file-x", "endpoint": "/v1/chat/completions"}
    refused = httpx.post(f"{server.url}/v1/batches", json=body, headers=bearer(KEYS["embed"]))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "missing_scope"


def test_keys_of_a_tenant_share_prefixes_and_objects_and_others_do_not(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        "".join(
            f'[[keys]]\nname = "{name}"\ntenant = "{tenant}"\nhash = "{hash_of(name)}"\n'
            for name, tenant in (("a1", "a"), ("a2", "a"), ("b1", "b"))
        )
    )
    found = read_key_file(file)
    callers = {name: found.find(name.encode()) for name in ("a1", "a2", "b1")}
    tenants = {name: caller.tenant for name, caller in callers.items() if caller}
    assert tenants["a1"] == tenants["a2"] != tenants["b1"]
    assert tenants["a1"].salt("s") != tenants["b1"].salt("s")
    assert tenants["a1"].id != tenants["b1"].id
    assert found.tenant_of_id(tenants["a1"].id) == tenants["a1"]
    assert found.tenant_of_id("tenant:c") is None
    assert found.find(b"a3") is None
    assert "secret" not in repr(tenants["a1"])


def test_limits_weight_and_priorities_are_the_tenants(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(
        f"""
        [[keys]]
        name = "a"
        hash = "{hash_of("one")}"
        [[keys]]
        name = "b"
        hash = "{hash_of("two")}"
        [tenants.a]
        weight = 3
        priority = "-5..5"
        requests_per_minute = 60
        kv_share = 0.5
        [defaults]
        max_concurrent = 2
        """
    )
    found = read_key_file(file)
    a, b = found.tenant("a"), found.tenant("b")
    assert (a.weight, a.priorities, a.limits.requests_per_minute) == (3.0, (-5, 5), 60)
    assert (a.limits.kv_share, a.limits.max_concurrent) == (0.5, None)
    assert (b.weight, b.priorities, b.limits.max_concurrent) == (1.0, None, 2)
    assert found.tenant("of a token").limits == b.limits


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "neither keys nor issuers"),
        (b"{", "no JSON or TOML"),
        (b"[[keys]]\nname = ", "no JSON or TOML"),
        (b"\xff\xfe", "no JSON or TOML"),
        (b'{"keys": [{"name": "a", "hash": "sha256:12"}]}', "keys.0.hash"),
        (b'{"keys": [{"name": "a b", "hash": "x"}]}', "keys.0.name"),
        (b'{"keys": [{"name": "a", "key": "secret"}]}', "keys.0.key"),
        (b'{"keyes": []}', "keyes"),
        (b"[" * 100_000, "no JSON or TOML"),
        (b'{"a":' * 100_000, "no JSON or TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_with_the_place(content: bytes, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        key_file(Path("keys"), content)
    assert refused.value.field == "keys"
    assert reason in str(refused.value)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": 0}, "tenants.a.weight"),
        ({"priority": "1..5"}, "tenants.a.priority"),
        ({"kv_share": 2}, "tenants.a.kv_share"),
        ({"max_concurrent": 0}, "tenants.a.max_concurrent"),
        ({"max_concurent": 1}, "tenants.a.max_concurent"),
    ],
)
def test_a_tenants_values_have_limits(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        key_file(Path("keys"), json.dumps({**rows(), "tenants": {"a": change}}).encode())


def test_two_keys_with_one_name_or_hash_are_refused() -> None:
    for field in ("name", "hash"):
        table = rows()
        first = table["keys"][0]
        table["keys"][1][field] = first[field]
        with pytest.raises(ConfigError, match=f"one key has the {field} {first[field]}$"):
            key_file(Path("keys"), json.dumps(table).encode())


async def test_a_changed_file_is_in_force_once_nobody_writes_it(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(rows()))
    ring = Keyring(ServerConfig(keys=str(file)))
    assert await ring.find(b"new") is None
    table = rows()
    table["keys"] = [{"name": "new", "hash": hash_of("new")}]
    file.write_text(json.dumps(table))
    ring.look()
    assert await ring.find(b"new") is None
    ring.look()
    assert await ring.find(b"new") is not None
    assert await ring.find(KEYS["generate"].encode()) is None


@pytest.mark.parametrize("content", [None, "", '{"keys": [{"name": "a"'])
async def test_keys_stay_in_force_while_their_file_cannot_be_used(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(rows()))
    ring = Keyring(ServerConfig(keys=str(file)))
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    for _ in range(4):
        ring.look()
    assert await ring.find(KEYS["generate"].encode()) is not None
    assert (ring.num_failures, ring.is_stale) == (1, True)
    assert [one.levelname for one in caplog.records] == ["ERROR"]
    assert "stay in force" in caplog.text
    file.write_text(json.dumps(rows()))
    for _ in range(2):
        ring.look()
    assert not ring.is_stale


@pytest.mark.parametrize("kind", ["device", "pipe", "folder", "long"])
async def test_no_file_of_keys_is_read_for_ever(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(rows()))
    ring = Keyring(ServerConfig(keys=str(file)))
    file.unlink()
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        monkeypatch.setattr(key_file_module, "MAX_FILE_BYTES", 100)
        file.write_text(json.dumps(rows()))
    for _ in range(3):
        ring.look()
    assert await ring.find(KEYS["generate"].encode()) is not None
    assert (ring.num_failures, ring.is_stale) == (1, True)
    reason = "more than 100 bytes" if kind == "long" else "no regular file"
    assert reason in caplog.text


def test_a_server_whose_keys_cannot_be_read_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        Keyring(ServerConfig(keys=str(tmp_path / "missing")))


def test_a_new_key_is_told_once_and_its_file_has_the_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("keys.toml", "keys.json"):
        file = tmp_path / name
        file.write_text("" if name.endswith("toml") else "{}")
        file.chmod(0o640)
        keys = []
        for key in ("one", "two"):
            argv = ["key", "new", key, "--tenant", "team", "--scope", "embed", "--file", str(file)]
            assert main(argv) == 0
            keys.append(capsys.readouterr().out.strip())
        assert all(len(key) == 46 and key not in file.read_text() for key in keys)
        found = read_key_file(file)
        caller = found.find(keys[0].encode())
        assert caller is not None
        assert (caller.name, caller.tenant.name, caller.scopes) == ("one", "team", {Scope.EMBED})
        assert os.stat(file).st_mode & 0o777 == 0o640
        assert main(["key", "new", "one", "--file", str(file)]) == 2
        assert main(["key", "new", "a b"]) == 2
        assert len(list(tmp_path.iterdir())) == (1 if name.endswith("toml") else 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_with_a_new_key_belongs_to_whom_it_belonged_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.toml"
    file.write_text("")
    file.chmod(0o640)
    os.chown(file, 65534, 65533)
    assert main(["key", "new", "one", "--file", str(file)]) == 0
    found = file.stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (65534, 65533, 0o640)
    before = file.read_bytes()

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "fchown", refused)
    capsys.readouterr()
    assert main(["key", "new", "two", "--file", str(file)]) == 2
    assert "belongs to user 65534 and group 65533; run this as" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_nobody_else_adds_a_key_between_the_reading_and_the_replacing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[str] = []

    def watched(content: bytes, row: KeyRow) -> bytes:
        folder = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        locked.append(row.name)
        return with_key(content, row)

    monkeypatch.setattr(key_file_module, "with_key", watched)
    assert main(["key", "new", "one", "--file", str(tmp_path / "keys.toml")]) == 0
    assert locked == ["one"]


def test_a_pipe_is_no_file_of_keys_and_holds_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "keys.toml")
    assert main(["key", "new", "one", "--file", str(tmp_path / "keys.toml")]) == 2
    assert "it is no regular file" in capsys.readouterr().err


def test_the_table_has_no_unguarded_route_but_the_probes_and_the_bare_page() -> None:
    opened = {path for path, scopes in ROUTE_SCOPES.items() if scopes == route_scopes.OPEN}
    assert opened == {"/health", "/ready", "/ping", "/", "/live.css", "/live.js"}
    assert ROUTE_SCOPES["/docs"] == ALL_SCOPES
