"""Tokens: those of an issuer are let in for what they say; all others are a 401."""

from __future__ import annotations

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
from octavo.server.tenants import jwks as jwks_module
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


async def test_keys_of_a_url_are_kept_fetched_again_and_outlive_their_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served: list[Any] = [{"keys": [jwk("RS256", KEYS["RS256"])]}]
    fetched: list[float] = []
    now = [0.0]

    async def fetch(self: Jwks) -> bytes:
        fetched.append(now[0])
        if served[0] is None:
            raise httpx.ConnectError("nobody is there")
        return json.dumps(served[0]).encode()

    monkeypatch.setattr(Jwks, "_fetch", fetch)
    keys = Jwks("https://login.example.com/jwks", clock=lambda: now[0])
    for _ in range(3):
        assert await keys.find("RS256", "RS256") is not None
    assert len(fetched) == 1
    assert await keys.find("unknown", "RS256") is None
    assert len(fetched) == 1  # whoever makes up ids does not make us fetch
    now[0] += jwks_module.RETRY_SECONDS
    served[0] = {"keys": [jwk("RS256", OTHER, "new")]}
    assert await keys.find("new", "RS256") is not None
    assert await keys.find("RS256", "RS256") is None
    now[0] += jwks_module.FRESH_SECONDS
    served[0] = None
    assert await keys.find("new", "RS256") is not None
    assert "stay in force" in caplog.text


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
