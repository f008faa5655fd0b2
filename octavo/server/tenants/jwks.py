"""The public keys of an issuer of tokens: from a file or a URL, kept and fetched again.

Used by `tokens`. Keys that were read stay in force while new ones cannot be had; the log says so.
Who asks for a key that is known never waits for the issuer. Needs PyJWT (the extra `jwt`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import jwt

from octavo.errors import ConfigError
from octavo.server.tenants.settings_file import read_settings

logger = logging.getLogger(__name__)

FRESH_SECONDS = 300.0
"""How long keys of a URL are used before they are fetched again."""
RETRY_SECONDS = 10.0
"""Between two fetches, whatever tokens ask for."""
FILE_SECONDS = 1.0
TIMEOUT_SECONDS = 5.0
MAX_BYTES = 2**20
KEY_TYPES = {"RS256": "RSA", "ES256": "EC", "EdDSA": "OKP"}
_UNUSABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError),
    *(httpx.HTTPError, httpx.InvalidURL, jwt.PyJWTError),
)
"""Raised where keys cannot be had, or are of any other shape."""


class NoKeysError(Exception):
    """The issuer's keys could never be had: no token of it can be judged."""


class Jwks:
    """One issuer's keys. One event loop's."""

    def __init__(self, source: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads a file at once; a URL when `refresh` is called, or with the first token. Raises
        ConfigError."""
        self._source = source
        self._clock = clock
        self._is_url = "://" in source
        self._keys: Mapping[tuple[str | None, str], jwt.PyJWK] = {}
        self._tried_at = -float("inf")
        self._fresh_until = -float("inf")
        self._stamp: tuple[int, int, int] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self.version = 0
        """Grows with every change: what was verified before counts no more."""
        if self._is_url:
            _check_url(source)
        else:
            try:
                self._read_file()
            except _UNUSABLE as error:
                message = f"jwks {source} cannot be used: {error}"
                raise ConfigError(message, field="keys") from error

    @property
    def is_url(self) -> bool:
        return self._is_url

    async def find(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        """Returns the key of a token's header, or None. Without an id, the only one that fits.
        Raises NoKeysError."""
        self.refresh()
        if self._find(key_id, algorithm) is None:
            fetching = self._begin()
            if fetching is not None:
                # Whoever leaves does not end it for others.
                await asyncio.shield(fetching)
        if not self._keys:
            raise NoKeysError
        return self._find(key_id, algorithm)

    def refresh(self) -> None:
        """Begins to look for new keys, if it is time; a file is read at once."""
        if self._clock() >= self._fresh_until:
            self._begin()

    def _find(self, key_id: str | None, algorithm: str) -> jwt.PyJWK | None:
        if key_id is not None:
            return self._keys.get((key_id, algorithm))
        fitting = [key for (_, name), key in self._keys.items() if name == algorithm]
        return fitting[0] if len(fitting) == 1 else None

    def _begin(self) -> asyncio.Task[None] | None:
        """Returns the fetch that is under way, or a new one; None if another token has just asked.
        A file has been read."""
        if self._fetching is not None and not self._fetching.done():
            return self._fetching
        now = self._clock()
        if now - self._tried_at < (RETRY_SECONDS if self._is_url else FILE_SECONDS):
            return None
        self._tried_at = now
        if self._is_url:
            self._fetching = asyncio.create_task(self._fetch_again(now))
            return self._fetching
        try:
            self._read_file()
            self._fresh_until = now + FILE_SECONDS
        except _UNUSABLE as error:
            self._report(error)
        return None

    async def _fetch_again(self, now: float) -> None:
        try:
            self._take(await self._fetch())
            self._fresh_until = now + FRESH_SECONDS
        except _UNUSABLE as error:
            self._report(error)

    def _report(self, error: Exception) -> None:
        if self._keys:
            message = "the keys of tokens were not read again, those before stay in force: %s: %s"
        else:
            message = "the keys of tokens cannot be fetched, no token can be judged: %s: %s"
        logger.error(message, self._source, str(error) or type(error).__name__)

    async def _fetch(self) -> bytes:
        content = bytearray()
        async with (
            asyncio.timeout(TIMEOUT_SECONDS),
            httpx.AsyncClient(timeout=TIMEOUT_SECONDS) as client,
            client.stream("GET", self._source) as answer,
        ):
            answer.raise_for_status()
            async for piece in answer.aiter_bytes():
                content += piece
                if len(content) > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES} bytes")
        return bytes(content)

    def _read_file(self) -> None:
        facts = os.stat(self._source)
        stamp = facts.st_mtime_ns, facts.st_ino, facts.st_size
        if stamp != self._stamp:
            self._take(read_settings(Path(self._source), MAX_BYTES))
            self._stamp = stamp

    def _take(self, content: bytes) -> None:
        keys = {
            (key.key_id, key.algorithm_name): key
            for key in jwt.PyJWKSet.from_json(content.decode()).keys
            # Never a symmetric one: whoever may verify with it could also sign.
            if KEY_TYPES.get(key.algorithm_name) == key.key_type
            and key.public_key_use in (None, "sig")
        }
        if not keys:
            raise ValueError(f"no public key for {', '.join(KEY_TYPES)}")
        self._keys = keys
        self.version += 1


def _check_url(url: str) -> None:
    """Raises ConfigError unless nobody on the way can change what comes."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        is_local = ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    if not (parts.scheme == "https" and host) and not (parts.scheme == "http" and is_local):
        message = f"jwks {url!r} must be a file, an https URL, or http on this host"
        raise ConfigError(message, field="keys")
