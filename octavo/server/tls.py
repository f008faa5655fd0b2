"""The certificate of an HTTPS server: checked early, and read again when it changes.

Used by `serve`. Never makes a connection itself: uvicorn does, from the same files.
"""

from __future__ import annotations

import asyncio
import logging
import os
import ssl

from octavo.config import ServerConfig
from octavo.errors import ConfigError

logger = logging.getLogger(__name__)

REFRESH_SECONDS = 5.0
"""How soon a changed certificate is noticed."""


def check_certificate(config: ServerConfig) -> None:
    """Raises ConfigError if the certificate or its key cannot be used."""
    if config.ssl_certfile is None:
        return
    _stamp(config)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile, password=lambda: ""
        )
    except (OSError, ValueError) as error:  # of which ssl.SSLError is one
        raise ConfigError(
            f"ssl_certfile {config.ssl_certfile} (key: {config.ssl_keyfile or 'the same file'}) "
            f"cannot be used: {error}; give a certificate in PEM and its key without a passphrase",
            field="ssl_certfile",
        ) from error


async def keep_fresh(
    context: ssl.SSLContext, config: ServerConfig, seconds: float = REFRESH_SECONDS
) -> None:
    """Reads the certificate again whenever its files change, for connections from then on.

    One that cannot be used is reported, and the one before stays. Runs until it is cancelled.
    """
    assert config.ssl_certfile is not None
    seen = _stamp(config)
    while True:
        await asyncio.sleep(seconds)
        try:
            stamp = _stamp(config)
            if stamp == seen:
                continue
            seen = stamp
            # Tried apart first: a context that got half of a pair could not serve with either.
            check_certificate(config)
            context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
        except (ConfigError, OSError, ValueError) as error:
            logger.error("the changed certificate is not used: %s", error)
        else:
            logger.info("the certificate was read again: %s", config.ssl_certfile)


def _stamp(config: ServerConfig) -> list[tuple[int, int, int]]:
    """Returns what changes with the files, links resolved. Raises ConfigError if one is missing."""
    stamps = []
    for field in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(config, field)
        if path is None:
            continue
        try:
            facts = os.stat(path)
        except OSError as error:
            raise ConfigError(f"{field} {path}: {error.strerror}", field=field) from error
        stamps.append((facts.st_mtime_ns, facts.st_ino, facts.st_size))
    return stamps
