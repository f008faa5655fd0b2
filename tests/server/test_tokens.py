"""Tokens: those of an issuer are let in for what they say; all others are a 401."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.errors import ApiError
from octavo.server.tenants import jwks as jwks_module
from octavo.server.tenants import tokens as tokens_module
from octavo.server.tenants.callers import Scope
from octavo.server.tenants.jwks import Jwks
from octavo.server.tenants.key_file import key_file
from octavo.server.tenants.keyring import Keyring, tokens_of
from tests.server.conftest import ServerThread
from tests.server.fake_engine import FakeEngine

ISSUER, AUDIENCE = "https://login.example.com", "octavo"
KEYS = {
    "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def jwk(name: str, key: Any, key_id: str | None = None) -> dict[str, Any]:
    made = jwt.get_algorithm_by_name(name).to_jwk(key.public_key(), as_dict=True)
    return {**made, "alg": name, "use": "sig", "kid": key_id or name}


def claims(**changes: Any) -> dict[str, Any]:
    now = int(time.time())
    values = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": now + 60, "iat": now}
    values |= {"org": {"id": "research"}, "scope": "generate openid", **changes}
    return {name: value for name, value in values.items() if value is not None}


def signed(name: str = "RS256", key: Any = None, **changes: Any) -> str:
    headers = {"kid": changes.pop("kid", name)}
    return jwt.encode(claims(**changes), key or KEYS[name], name, headers=headers)


def table(source: str, **changes: Any) -> bytes:
    row = {"issuer": ISSUER, "audience": AUDIENCE, "jwks": source, "tenant_claim": "org.id"}
    tenants = {"research": {"weight": 2}}
    return json.dumps({"issuers": [{**row, **changes}], "tenants": tenants}).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokens")
    keys = [jwk(name, key) for name, key in KEYS.items()]
    (made / "jwks.json").write_text(json.dumps({"keys": keys}))
    (made / "keys.json").write_bytes(table(str(made / "jwks.json")))
    return made


@pytest.fixture(scope="module")
def ring(folder: Path) -> Keyring:
    return Keyring(ServerConfig(keys=str(folder / "keys.json")))


def part(value: object) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def confused() -> str:
    """Signed with the public key, as if that were the secret of HS256."""
    public = KEYS["RS256"].public_key()
    secret = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    body = f"{part({'alg': 'HS256', 'kid': 'RS256'})}.{part(claims())}"
    return f"{body}.{part(hmac.new(secret, body.encode(), hashlib.sha256).digest())}"


def with_own_key() -> str:
    """Brings the key along that it is signed with."""
    headers = {"kid": "RS256", "jwk": jwk("RS256", OTHER), "jku": "http://127.0.0.1/jwks"}
    return jwt.encode(claims(), OTHER, "RS256", headers=headers)


NOW = int(time.time())
REFUSED = {
    "forged": lambda: signed(key=OTHER),
    "changed": lambda: signed()[:-8] + "AAAAAAAA",
    "other claims": lambda: ".".join(
        [signed().split(".")[0], part(claims(sub="eve")), signed().split(".")[2]]
    ),
    "expired": lambda: signed(exp=NOW - 3600),
    "without an end": lambda: signed(exp=None),
    "not begun": lambda: signed(nbf=NOW + 3600),
    "other issuer": lambda: signed(iss="https://other.example.com"),
    "no issuer": lambda: signed(iss=None),
    "other audience": lambda: signed(aud="billing"),
    "no audience": lambda: signed(aud=None),
    "alg none": lambda: f"{part({'alg': 'none', 'kid': 'RS256'})}.{part(claims())}.",
    "alg None": lambda: f"{part({'alg': 'None'})}.{part(claims())}.",
    "alg missing": lambda: f"{part({'kid': 'RS256'})}.{part(claims())}.AAAA",
    "alg a list": lambda: f"{part({'alg': ['RS256']})}.{part(claims())}.AAAA",
    "key confusion": confused,
    "own key": with_own_key,
    "key of another algorithm": lambda: signed("ES256", kid="RS256"),
    "unknown key": lambda: signed(kid="gone"),
    "no tenant": lambda: signed(org=None),
    "tenant a list": lambda: signed(org={"id": ["research"]}),
    "tenant with a line": lambda: signed(org={"id": "a\nb"}),
    "tenant that is no text": lambda: signed(org={"id": "\ud800"}),
    "subject that is no text": lambda: signed(sub="\ud800"),
    "deep": lambda: f"{part({'alg': 'RS256'})}.{part(b'[' * 9000)}.AAAA",
    "long": lambda: signed(padding="x" * 20_000),
}


@pytest.fixture(scope="module")
def server(folder: Path) -> Any:
    thread = ServerThread(
        FakeEngine(), ServerConfig(port=0, keys=str(folder / "keys.json"), shutdown_timeout=1.0)
    )
    yield thread
    thread.end()


@pytest.mark.parametrize("name", sorted(KEYS))
async def test_a_token_of_the_issuer_says_tenant_and_scopes(ring: Keyring, name: str) -> None:
    for _ in range(2):  # verified, and known
        caller = await ring.find(signed(name).encode())
        assert caller is not None
        assert (caller.name, caller.tenant.name, caller.tenant.weight) == ("alice", "research", 2.0)
        assert caller.scopes == {Scope.GENERATE}


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_whatever_is_wrong_with_a_token_is_a_401(server: Any, case: str) -> None:
    url, token = f"{server.url}/v1/models", REFUSED[case]()
    answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"})
    assert answer.status_code == 401, answer.text
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_a_token_is_let_in_for_its_scopes_alone(server: Any) -> None:
    def status(path: str, **changes: Any) -> int:
        headers = {"Authorization": f"Bearer {signed(**changes)}"}
        return httpx.get(server.url + path, headers=headers).status_code

    assert status("/v1/models") == 200
    assert status("/metrics") == 403
    assert status("/metrics", scope=["metrics", 5]) == 200
    assert status("/v1/models", scope="openid") == 403
    assert status("/v1/models", scope=None) == 403


async def test_scopes_and_tenants_have_an_issuers_own_words(folder: Path) -> None:
    content = table(
        str(folder / "jwks.json"),
        scopes={"llm:use": "generate"},
        scope_claim="https://example.com/roles",
        tenant_prefix="corp/",
    )
    tokens = tokens_of(key_file(Path("keys"), content))
    assert tokens is not None
    roles = {"https://example.com/roles": ["llm:use", "metrics"]}
    caller = await tokens.find(signed(**roles).encode())
    assert caller is not None
    assert (caller.tenant.name, caller.scopes) == ("corp/research", {Scope.GENERATE})


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=st.one_of(st.binary(max_size=200), st.from_regex(rb"[\w-]+\.[\w-]+\.[\w-]*")))
async def test_no_text_is_more_than_refused(ring: Keyring, sent: bytes) -> None:
    assert await ring.find(sent) is None


async def test_a_known_token_ends_with_its_time_and_with_its_key(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [jwk("EdDSA", KEYS["EdDSA"])]}))
    tokens = tokens_of(key_file(Path("keys"), table(str(file), leeway_seconds=0)))
    assert tokens is not None
    token = signed("EdDSA").encode()
    assert await tokens.find(token) is not None
    tokens._clock = lambda: time.time() + 61
    assert await tokens.find(signed("EdDSA", exp=int(time.time()) + 30).encode()) is not None
    assert token not in tokens._known
    tokens._clock = time.time
    assert await tokens.find(token) is not None
    file.write_text(json.dumps({"keys": [jwk("RS256", OTHER, "other")]}))
    for _, keys in tokens._issuers:
        keys._fresh_until = keys._tried_at = -1e9
    assert await tokens.find(token) is None


class Issuer:
    """Stands for the server of an issuer's keys."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.served: Any = {"keys": [jwk("RS256", KEYS["RS256"])]}
        """None: it is down."""
        self.now, self.num_fetched = 0.0, 0
        self.is_quick = asyncio.Event()
        self.is_quick.set()
        monkeypatch.setattr(Jwks, "_fetch", lambda _: self._fetch())
        monkeypatch.setattr(
            tokens_module, "Jwks", lambda source: Jwks(source, clock=lambda: self.now)
        )

    async def _fetch(self) -> bytes:
        self.num_fetched += 1
        await self.is_quick.wait()
        if self.served is None:
            raise httpx.ConnectError("nobody is there")
        return json.dumps(self.served).encode()


URL = "https://login.example.com/jwks"


async def test_keys_of_a_url_are_kept_fetched_again_and_outlive_their_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = Issuer(monkeypatch)
    keys = Jwks(URL, clock=lambda: issuer.now)
    for _ in range(3):
        assert await keys.find("RS256", "RS256") is not None
    assert issuer.num_fetched == 1
    assert await keys.find("unknown", "RS256") is None
    assert issuer.num_fetched == 1  # whoever makes up ids does not make us fetch
    issuer.now += jwks_module.RETRY_SECONDS
    issuer.served = {"keys": [jwk("RS256", OTHER, "new")]}
    assert await keys.find("new", "RS256") is not None
    assert await keys.find("RS256", "RS256") is None
    issuer.now += jwks_module.FRESH_SECONDS
    issuer.served = None
    assert await keys.find("new", "RS256") is not None
    await asyncio.sleep(0.01)
    assert await keys.find("new", "RS256") is not None
    assert "stay in force" in caplog.text


async def test_a_slow_issuer_holds_nobody_whose_key_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    issuer = Issuer(monkeypatch)
    tokens = tokens_of(key_file(Path("keys"), table(URL)))
    assert tokens is not None
    known, unknown = signed().encode(), signed(kid="gone").encode()
    assert await tokens.find(known) is not None
    issuer.now += jwks_module.FRESH_SECONDS
    issuer.is_quick.clear()
    for token in (known, signed(sub="bob").encode()):
        assert await asyncio.wait_for(tokens.find(token), 1) is not None
    waiting = asyncio.create_task(tokens.find(unknown))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    waiting.cancel()  # its client leaves; the fetch goes on
    issuer.served = {"keys": [jwk("RS256", OTHER, "new")]}
    issuer.is_quick.set()
    await asyncio.sleep(0.01)
    assert await tokens.find(known) is None
    assert issuer.num_fetched == 2


async def test_fetched_keys_outlive_a_change_of_the_file_of_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, file = Issuer(monkeypatch), tmp_path / "keys.json"
    file.write_bytes(table(URL))
    ring = Keyring(ServerConfig(keys=str(file)))
    assert await ring.find(signed().encode()) is not None
    issuer.served = None
    for content in (table(URL, scope_claim="scp"), table(URL, audience="other")):
        file.write_bytes(content + b"\n")
        for _ in range(2):
            ring.look()
    assert await ring.find(signed().encode()) is None
    caller = await ring.find(signed(aud="other").encode())
    assert caller is not None
    assert caller.tenant.name == "research"


async def test_a_token_whose_issuers_keys_never_came_cannot_be_judged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    issuer = Issuer(monkeypatch)
    issuer.served = None
    tokens = tokens_of(key_file(Path("keys"), table(URL)))
    assert tokens is not None
    for _ in range(2):  # fetched in vain, and not fetched again so soon
        with pytest.raises(ApiError, match="cannot be fetched") as refused:
            await tokens.find(signed().encode())
        assert (refused.value.status, refused.value.code) == (503, "issuer_unavailable")
        assert refused.value.headers == {"Retry-After": "10"}
    assert await tokens.find(signed(iss="https://other.example.com").encode()) is None
    assert issuer.num_fetched == 1
    assert "stay in force" not in caplog.text
    issuer.now += jwks_module.RETRY_SECONDS
    issuer.served = []  # no set of keys at all
    with pytest.raises(ApiError):
        await tokens.find(signed().encode())
    issuer.now += jwks_module.RETRY_SECONDS
    issuer.served = {"keys": [jwk("RS256", KEYS["RS256"])]}
    assert await tokens.find(signed().encode()) is not None


async def test_keys_are_fetched_before_the_first_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer, file = Issuer(monkeypatch), tmp_path / "keys.json"
    file.write_bytes(table(URL))
    fresh = asyncio.create_task(Keyring(ServerConfig(keys=str(file))).keep_fresh())
    await asyncio.sleep(0.01)
    assert issuer.num_fetched == 1
    fresh.cancel()


def test_a_server_without_its_issuers_keys_answers_503(tmp_path: Path) -> None:
    source = "http://127.0.0.1:9/jwks"  # nobody listens there
    (tmp_path / "keys.json").write_bytes(table(source))
    thread = ServerThread(FakeEngine(), ServerConfig(port=0, keys=str(tmp_path / "keys.json")))
    try:
        headers = {"Authorization": f"Bearer {signed()}"}
        answer = httpx.get(f"{thread.url}/v1/models", headers=headers)
    finally:
        thread.end()
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")
    assert answer.json()["error"]["code"] == "issuer_unavailable"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://login.example.com/jwks", "https"),
        ("ftp://127.0.0.1/jwks", "https"),
        ("/nowhere/jwks.json", "cannot be used"),
        ("/dev/zero", "no regular file"),
    ],
)
def test_keys_that_cannot_be_trusted_or_read_are_refused(source: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tokens_of(key_file(Path("keys"), table(source)))


def test_a_symmetric_key_is_no_public_key(tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    secret = {"kty": "oct", "k": part(b"secret" * 8), "alg": "HS256", "kid": "RS256"}
    file.write_text(json.dumps({"keys": [secret]}))
    with pytest.raises(ConfigError, match="no public key"):
        tokens_of(key_file(Path("keys"), table(str(file))))


def test_without_the_library_issuers_are_an_error_that_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    monkeypatch.delitem(sys.modules, "octavo.server.tenants.tokens", raising=False)
    monkeypatch.delitem(sys.modules, "octavo.server.tenants.jwks", raising=False)
    with pytest.raises(ConfigError, match=r"octavo\[jwt\]"):
        tokens_of(key_file(Path("keys"), table(str(folder / "jwks.json"))))
