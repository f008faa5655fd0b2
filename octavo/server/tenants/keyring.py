"""Finds who sent a key or a token; reads the file of keys again when it changes.

One in each front process, made with the app and kept fresh by `serve`. Never logs a key.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.tenants.callers import (
    ALL_SCOPES,
    NOBODY,
    TENANT_SCOPES,
    Caller,
    Scope,
    Tenant,
    plain_tenant,
)
from octavo.server.tenants.key_file import KeyFile, read_key_file

if TYPE_CHECKING:
    from octavo.server.tenants.tokens import Tokens

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 1.0
"""How often the file is looked at. It is read once it was the same for two looks: whoever writes it
in place has then ended."""
Stamp = tuple[int, int, int, int]


class Keyring:
    """All that is let in.

    no keys                       everyone may do everything
    --api-key                     a tenant; nobody is the operator
    --operator-key                everything
    --keys                        what the file says
    """

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError if the file of keys cannot be used."""
        self._plain = [
            (hashlib.sha256(spelled).digest(), caller)
            for keys, scopes in (
                (config.api_key, TENANT_SCOPES),
                (config.operator_key, ALL_SCOPES),
            )
            for caller, key in ((_plain_caller(key, scopes), key) for key in keys)
            for spelled in _spellings(key)
        ]
        self._path = None if config.keys is None else Path(config.keys)
        self._file: KeyFile | None = None
        self._tokens: Tokens | None = None
        self.num_failures = 0
        """Times that a changed file could not be used."""
        self.is_stale = False
        """Whether the file cannot be used now, and what it said before is in force."""
        self._read: Stamp | None = None
        self._seen: Stamp | None = None
        if self._path is not None:
            self._read = self._seen = _stamp(self._path)
            self._take(self._path)

    def _take(self, path: Path) -> None:
        file = read_key_file(path)
        self._tokens = tokens_of(file, self._tokens)
        self._file = file

    @property
    def is_open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._plain and self._path is None

    @property
    def is_plain(self) -> bool:
        """Whether the options alone say who is let in."""
        return self._path is None

    async def find(self, sent: bytes) -> Caller | None:
        """Returns who sends a key, or a token; None for nobody that is known. Raises ApiError (503)
        for a token that cannot be judged now."""
        digest = hashlib.sha256(sent).digest()
        found = None
        # All plain keys are compared, whichever fits: no early end to measure.
        for known, caller in self._plain:
            if hmac.compare_digest(digest, known):
                found = caller
        if found is None and self._file is not None:
            found = self._file.find(sent)
        if found is None and self._tokens is not None:
            found = await self._tokens.find(sent)
        return found

    def tenant_of_id(self, id: str) -> Tenant | None:
        """Returns the tenant to whom stored objects belong; None if it is not known any more."""
        if self.is_open:
            return NOBODY if id == NOBODY.id else None
        for _, caller in self._plain:
            if caller.tenant.id == id:
                return caller.tenant
        return None if self._file is None else self._file.tenant_of_id(id)

    async def keep_fresh(self, seconds: float = REFRESH_SECONDS) -> None:
        """Reads the file again whenever it has changed. Runs until it is cancelled."""
        asked = None
        while self._path is not None:
            if self._tokens is not None and self._tokens is not asked:
                asked = self._tokens
                asked.refresh()
            await asyncio.sleep(seconds)
            await asyncio.to_thread(self.look)  # a long file takes a second to parse

    def look(self) -> None:
        """Looks at the file; one that cannot be used is reported, and the one before stays."""
        assert self._path is not None
        stamp = _stamp(self._path)
        if stamp != self._seen:
            self._seen = stamp  # Somebody may still write.
            return
        if stamp == self._read:
            return
        self._read = stamp
        try:
            self._take(self._path)
        except ConfigError as error:
            self.num_failures += 1
            self.is_stale = True
            logger.error("the changed keys are not used, those before stay in force: %s", error)
        else:
            self.is_stale = False
            logger.info("the keys were read again: %s", self._path)


def tokens_of(file: KeyFile, before: Tokens | None = None) -> Tokens | None:
    """Returns what knows the tokens of a file's issuers, with the keys that `before` has fetched;
    None if it names none. Raises ConfigError."""
    if not file.issuers:
        return None
    try:
        from octavo.server.tenants.tokens import Tokens
    except ImportError as error:
        message = f"keys with issuers need PyJWT ({error}); pip install 'octavo[jwt]'"
        raise ConfigError(message, field="keys") from error
    return Tokens(file.issuers, file.tenant, before=before)


def _plain_caller(key: str, scopes: frozenset[Scope]) -> Caller:
    tenant = plain_tenant(key)
    return Caller(name=tenant.name, tenant=tenant, scopes=scopes)


def _spellings(key: str) -> set[bytes]:
    """Returns the bytes of a key in a header: UTF-8 (curl) or Latin-1 (HTTP's old default)."""
    spelled = {key.encode("utf-8", "surrogateescape")}
    if all(ord(char) < 256 for char in key):
        spelled.add(key.encode("latin-1"))
    return spelled


def _stamp(path: Path) -> Stamp | None:
    """Returns what changes with the file or the right to read it; None if it is not there."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_size
