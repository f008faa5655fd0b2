"""The file of `--keys`: keys by their hashes, tenants with their limits, issuers of tokens.

Read by `keyring`, which keeps what was read before when a file cannot be used; written by
`octavo key new`. JSON or TOML, told apart by the first character. Never holds a key.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from octavo.errors import ConfigError
from octavo.request import NAMED
from octavo.request_limits import MAX_INT
from octavo.server.tenants.callers import (
    TENANT_SCOPES,
    Caller,
    Limits,
    Scope,
    Tenant,
    named_id,
    named_secret,
)
from octavo.server.tenants.settings_file import read_settings

MAX_FILE_BYTES = 32 * 2**20
KEY_PREFIX, KEY_BYTES = "ov-", 32
_HASH = r"sha256:[0-9a-f]{64}"
_MAX_SHOWN = 5
"""Mistakes that are named at once."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._@/-]{0,127}"
Name = Annotated[str, Field(pattern=f"^{NAME}$")]
Count = Annotated[int, Field(ge=1, le=2**53)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class KeyRow(_Strict):
    """One key."""

    name: Name
    tenant: Name | None = None
    """Its own name if there is none."""
    hash: str = Field(pattern=f"^{_HASH}$")
    scopes: frozenset[Scope] = TENANT_SCOPES

    @field_validator("scopes", mode="before")
    @classmethod
    def _read_scopes(cls, given: object) -> object:
        if not isinstance(given, list | tuple | frozenset) or not given:
            raise ValueError(f"must be a list of {', '.join(Scope)}")
        if unknown := len(set(given) - set(Scope)):
            raise ValueError(f"{unknown} of them are none of {', '.join(Scope)}")
        return frozenset(map(Scope, given))


class TenantRow(_Strict):
    """What a tenant gets."""

    weight: float = Field(1.0, ge=0.01, le=100.0, strict=False)
    priority: str | None = Field(None, pattern=r"^-?[0-9]{1,10}\.\.-?[0-9]{1,10}$")
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    tokens_per_day: Count | None = None
    max_concurrent: Count | None = None
    kv_share: float | None = Field(None, gt=0.0, le=1.0, strict=False)

    @field_validator("priority")
    @classmethod
    def _check_priority(cls, given: str | None) -> str | None:
        if given is not None:
            low, high = map(int, given.split(".."))
            if not -MAX_INT <= low <= 0 <= high <= MAX_INT:
                raise ValueError("must be a range that holds 0, like -10..10")
        return given

    @property
    def priorities(self) -> tuple[int, int] | None:
        if self.priority is None:
            return None
        low, high = map(int, self.priority.split(".."))
        return low, high

    @property
    def limits(self) -> Limits:
        return Limits(
            requests_per_minute=self.requests_per_minute,
            tokens_per_minute=self.tokens_per_minute,
            tokens_per_day=self.tokens_per_day,
            max_concurrent=self.max_concurrent,
            kv_share=self.kv_share,
        )


class IssuerRow(_Strict):
    """Who signs tokens that are let in."""

    issuer: str = Field(min_length=1, max_length=1024)
    audience: str = Field(min_length=1, max_length=1024)
    jwks: str = Field(min_length=1, max_length=4096)
    """A file, or a URL."""
    algorithms: tuple[Literal["RS256", "ES256", "EdDSA"], ...] = Field(
        ("RS256", "ES256", "EdDSA"), min_length=1, strict=False
    )
    tenant_prefix: str = Field("", max_length=64)
    """Before its tenants' names, so that those of two issuers are told apart."""
    tenant_claim: str = Field("sub", min_length=1, max_length=256)
    scope_claim: str = Field("scope", min_length=1, max_length=256)
    scopes: Mapping[str, Annotated[Scope, Field(strict=False)]] | None = None
    """What the issuer calls our scopes; by their own names if there is none."""
    leeway_seconds: int = Field(30, ge=0, le=600)


class _File(_Strict):
    keys: tuple[KeyRow, ...] = Field((), strict=False)
    tenants: Mapping[Name, TenantRow] = Field(default_factory=dict)
    defaults: TenantRow = Field(default_factory=lambda: TenantRow.model_validate({}))
    issuers: tuple[IssuerRow, ...] = Field((), strict=False)


class KeyFile:
    """A file that was read whole and makes sense."""

    def __init__(self, rows: _File) -> None:
        self._rows = rows
        self.issuers = rows.issuers
        self._tenants: dict[str, Tenant] = {}
        """Those that are named in the file; of others (of tokens) there is no end."""
        for name in [*rows.tenants, *(row.tenant or row.name for row in rows.keys)]:
            self._tenants[name] = self._made(name)
        self._callers = {
            bytes.fromhex(row.hash.removeprefix("sha256:")): Caller(
                name=row.name, tenant=self.tenant(row.tenant or row.name), scopes=row.scopes
            )
            for row in rows.keys
        }

    def find(self, key: bytes) -> Caller | None:
        """Returns whose key it is. A lookup by the hash may end early: what it tells of time is of
        the hash, from which no key can be made."""
        return self._callers.get(hashlib.sha256(key).digest())

    def tenant(self, name: str) -> Tenant:
        """Returns the tenant of a name, with the default limits if the file does not name it."""
        found = self._tenants.get(name)
        return self._made(name) if found is None else found

    def tenant_of_id(self, id: str) -> Tenant | None:
        """Returns the tenant to whom stored objects belong, or None: the file does not know it."""
        name = id.removeprefix(NAMED)
        if name == id or not (name in self._tenants or self.issuers):
            return None
        return self.tenant(name)

    def _made(self, name: str) -> Tenant:
        row = self._rows.tenants.get(name, self._rows.defaults)
        return Tenant(
            id=named_id(name),
            name=name,
            secret=named_secret(name),
            limits=row.limits,
            weight=row.weight,
            priorities=row.priorities,
        )


def read_key_file(path: Path) -> KeyFile:
    """Returns what a file says. Raises ConfigError, which says what is wrong and where."""
    try:
        content = read_settings(path, MAX_FILE_BYTES)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    except ValueError as error:
        raise _broken(path, str(error)) from error
    return key_file(path, content)


def key_file(path: Path, content: bytes) -> KeyFile:
    """Returns what the content of a file says. Raises ConfigError."""
    if len(content) > MAX_FILE_BYTES:
        raise _broken(path, f"it has {len(content)} bytes, the limit is {MAX_FILE_BYTES}")
    try:
        rows = _File.model_validate(parsed(content))
    except (ValueError, RecursionError) as error:
        raise _broken(path, _reasons(error)) from error
    if not (rows.keys or rows.issuers):
        raise _broken(path, "it has neither keys nor issuers, and would let nobody in")
    for field in ("name", "hash"):
        counted = Counter(getattr(row, field) for row in rows.keys)
        if twice := [value for value, count in counted.items() if count > 1]:
            more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
            raise _broken(path, f"more than one key has the {field} {twice[0]}{more}")
    return KeyFile(rows)


def parsed(content: bytes) -> dict[str, Any]:
    """Returns the tables of a file. Raises ValueError."""
    text = content.decode("utf-8")
    if text.lstrip().startswith("{"):
        return json.loads(text)
    return tomllib.loads(text)


def with_key(content: bytes, row: KeyRow) -> bytes:
    """Returns the content of a file with a key more, in its own language; TOML where it is empty.
    Raises ValueError."""
    values = {"name": row.name, "hash": row.hash, "scopes": sorted(row.scopes)}
    if row.tenant is not None:
        values["tenant"] = row.tenant
    if content.lstrip().startswith(b"{"):
        tables = parsed(content)
        tables["keys"] = [*tables.get("keys", []), values]
        return json.dumps(tables, indent=2).encode() + b"\n"
    # JSON's texts and lists of texts are TOML's.
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    start = content.rstrip() + b"\n\n" if content.strip() else b""
    return start + "\n".join(["[[keys]]", *lines, ""]).encode()


def new_key() -> str:
    """Returns a key that nobody can guess."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    """Returns what the file keeps of a key. Keys are long and random: no slow hash is needed."""
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def _broken(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"keys {path} cannot be used: {reason}", field="keys")


def _reasons(error: Exception) -> str:
    """Words the mistakes by their places. Never a value: it may be a key in a wrong place."""
    if not isinstance(error, ValidationError):
        return re.sub(r"\s+", " ", f"it is no JSON or TOML ({error})")[:300]
    found = error.errors(include_input=False, include_url=False, include_context=False)
    told = [f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in found]
    more = len(told) - _MAX_SHOWN
    return "; ".join(told[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
