"""The words of access: what a key may do (Scope), whose it is (Tenant), and who asks (Caller).

Made by `keyring` and `tokens`; routes find the Caller of a request with `caller_of`.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from enum import StrEnum

from starlette.requests import Request

from octavo.request import NAMED, Share


class Scope(StrEnum):
    """What a key may be for."""

    GENERATE = "generate"
    """Texts: chats, completions, responses, what is stored of them, and what only looks at them."""
    EMBED = "embed"
    """Vectors and scores."""
    METRICS = "metrics"
    """Numbers of all tenants together."""
    OPERATE = "operate"
    """What touches all tenants; any priority."""


ALL_SCOPES = frozenset(Scope)
TENANT_SCOPES = frozenset({Scope.GENERATE, Scope.EMBED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one tenant gets; None for any amount."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    """Prompts and answers; a day is any 24 hours."""
    max_concurrent: int | None = None
    """Requests that are served at once."""
    kv_share: float | None = None
    """Share of the KV cache above which no further request of its own starts."""

    @property
    def is_counted(self) -> bool:
        """Whether something is to be counted for it outside the engine."""
        counted = (self.requests_per_minute, self.tokens_per_minute, self.tokens_per_day)
        return self.max_concurrent is not None or any(one is not None for one in counted)


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Whose requests, stored objects, cached prefixes and budgets are told apart from others'."""

    id: str
    """To whom what is stored belongs; "" where nobody needs a key. Tells nothing of a key."""
    name: str
    """As logs and operators see it."""
    secret: bytes = field(repr=False)
    """What its cached prefixes are bound to; empty where nobody needs a key."""
    limits: Limits = NO_LIMITS
    weight: float = 1.0
    """Its share of the engine, in proportion to those of others that have work."""
    priorities: tuple[int, int] | None = None
    """Lowest and highest that it may ask for; None: those of `--allow-priority`."""

    @property
    def share(self) -> Share:
        """What the engine is told of it."""
        limit = self.limits.kv_share
        return Share(tenant=self.id, weight=self.weight, kv_share=1.0 if limit is None else limit)

    def salt(self, client_salt: str) -> str:
        """Returns the cache salt of a request: the client's, bound to the tenant.

        A client can so separate its own requests, but never reach the blocks of another tenant.
        """
        if not self.secret:
            return client_salt
        return hmac.new(self.secret, client_salt.encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: a key or a token, and its tenant."""

    name: str
    """Of the key, for logs; of a token, its subject."""
    tenant: Tenant
    scopes: frozenset[Scope]

    @property
    def is_operator(self) -> bool:
        return Scope.OPERATE in self.scopes


NOBODY = Tenant(id="", name="", secret=b"")
ANYONE = Caller(name="", tenant=NOBODY, scopes=ALL_SCOPES)
"""Whoever asks where no key is needed."""
STRANGER = Caller(name="", tenant=NOBODY, scopes=frozenset())
"""Whoever asks for an open route, of which no key was asked."""


def plain_tenant(key: str) -> Tenant:
    """Returns the tenant of a key that stands in an option: the key is all that is known of it."""
    raw = key.encode("utf-8", "surrogateescape")
    owner = hmac.new(raw, b"octavo: owner of stored objects", hashlib.sha256).hexdigest()
    return Tenant(id=owner, name=f"key-{hashlib.sha256(raw).hexdigest()[:8]}", secret=raw)


def named_id(name: str) -> str:
    """Returns the id of a tenant with a name; no key's id has a colon."""
    return NAMED + name


def named_secret(name: str) -> bytes:
    """Returns what the prefixes of a tenant with a name are bound to, whichever key it sends: of
    one length, since HMAC takes a short key and the same with zeros behind it for one."""
    return hashlib.sha256(b"octavo: tenant\0" + name.encode()).digest()


def caller_of(request: Request) -> Caller:
    """Returns who asks."""
    return request.scope["state"]["caller"]


def tenant_of(request: Request) -> str:
    """Returns to whom what a request stores belongs."""
    return caller_of(request).tenant.id
