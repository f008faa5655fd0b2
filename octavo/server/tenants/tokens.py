"""Tokens (JWT) of the issuers that the file of keys names: who sends one, and for what.

Used by `keyring`, with the library PyJWT. A token is let in if an issuer's public key has signed
it, by one of three asymmetric algorithms, for us (audience), and it is not over. Never logs one.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jwt

from octavo.engine.messages import is_unicode
from octavo.server.errors import ApiError
from octavo.server.tenants.callers import Caller, Scope, Tenant
from octavo.server.tenants.jwks import RETRY_SECONDS, Jwks, NoKeysError
from octavo.server.tenants.key_file import IssuerRow

MAX_TOKEN_BYTES = 16 * 1024
NO_KEYS = "issuer_unavailable"
MAX_KNOWN = 4096
"""Tokens that are not verified again until they are over, or keys have changed."""
_TENANT = re.compile(r"[!-~]{1,128}")
_SHAPE = re.compile(rb"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*")
_REQUIRED = ["exp", "iss", "aud"]


class _Known(NamedTuple):
    caller: Caller
    expires_at: float
    jwks: Jwks
    version: int


class Tokens:
    """The issuers, and tokens that were verified. One event loop's."""

    def __init__(
        self,
        issuers: Sequence[IssuerRow],
        tenant: Callable[[str], Tenant],
        clock: Callable[[], float] = time.time,
        before: Tokens | None = None,
    ) -> None:
        """`tenant` makes the tenant of a name; `clock` tells Unix seconds. Keys that `before` has
        fetched stay in force: the issuer may be down just now. Raises ConfigError if the keys of
        an issuer cannot be read."""
        known = {} if before is None else before._fetched()
        self._issuers = [(row, known.get(row.jwks) or Jwks(row.jwks)) for row in issuers]
        self._tenant = tenant
        self._clock = clock
        self._known: OrderedDict[bytes, _Known] = OrderedDict()

    async def find(self, sent: bytes) -> Caller | None:
        """Returns who sends a token, or None: it is none, or not valid (now, here, from them).
        Raises ApiError (503) if that cannot be told for want of its issuer's keys."""
        if len(sent) > MAX_TOKEN_BYTES or not _SHAPE.fullmatch(sent):
            return None
        digest = hashlib.sha256(sent).digest()
        known = self._known.get(digest)
        if known is not None:
            known.jwks.refresh()
            if known.version == known.jwks.version and self._clock() < known.expires_at:
                return known.caller
            del self._known[digest]
        lacks_keys = False
        try:
            header = jwt.get_unverified_header(sent)
            claimed = jwt.decode(sent, options={"verify_signature": False})
            for row, jwks in self._issuers:
                if row.issuer != claimed.get("iss") or header["alg"] not in row.algorithms:
                    continue
                try:
                    key = await jwks.find(header.get("kid"), header["alg"])
                except NoKeysError:
                    lacks_keys, key = True, None
                if key is None:
                    continue
                claims = self._verified(sent, row, key)
                if claims is None:
                    continue
                caller = self._caller(row, claims)
                if caller is not None:
                    over = float(claims["exp"]) + row.leeway_seconds
                    self._keep(digest, _Known(caller, over, jwks, jwks.version))
                return caller
        except (jwt.PyJWTError, ValueError, TypeError, KeyError, RecursionError, OverflowError):
            pass
        if lacks_keys:
            message = "the keys of your token's issuer cannot be fetched now; try again later"
            headers = {"Retry-After": str(math.ceil(RETRY_SECONDS))}
            raise ApiError(503, message, code=NO_KEYS, headers=headers)
        return None

    def refresh(self) -> None:
        """Begins to fetch the keys of issuers that are not there, before the first token asks."""
        for _, jwks in self._issuers:
            jwks.refresh()

    def _fetched(self) -> dict[str, Jwks]:
        return {row.jwks: jwks for row, jwks in self._issuers if jwks.is_url}

    def _verified(self, sent: bytes, row: IssuerRow, key: jwt.PyJWK) -> dict[str, Any] | None:
        """Returns the claims of a token. Raises jwt.PyJWTError if it is not valid."""
        return jwt.decode(
            sent,
            key=key,
            algorithms=[key.algorithm_name],
            audience=row.audience,
            issuer=row.issuer,
            leeway=row.leeway_seconds,
            options={"require": _REQUIRED},
        )

    def _caller(self, row: IssuerRow, claims: Mapping[str, Any]) -> Caller | None:
        name = _claim(claims, row.tenant_claim)
        if not isinstance(name, str) or not _TENANT.fullmatch(row.tenant_prefix + name):
            return None
        told = _claim(claims, row.scope_claim)
        words = told.split() if isinstance(told, str) else told if isinstance(told, list) else []
        names = row.scopes or {scope.value: scope for scope in Scope}
        scopes = frozenset(names[word] for word in words if isinstance(word, str) and word in names)
        subject = claims.get("sub")
        if isinstance(subject, str) and not is_unicode(subject):
            return None  # JSON can spell half a character; no log or guard could
        return Caller(
            name=subject[:128] if isinstance(subject, str) else name,
            tenant=self._tenant(row.tenant_prefix + name),
            scopes=scopes,
        )

    def _keep(self, digest: bytes, known: _Known) -> None:
        self._known[digest] = known
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def _claim(claims: Mapping[str, Any], name: str) -> object:
    """Returns a claim by its name, or by a path of names with dots between."""
    if name in claims:
        return claims[name]
    found: object = claims
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
