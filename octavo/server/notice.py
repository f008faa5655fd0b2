"""The notice that a machine is about to be taken away: a file that appears, or a URL that says so.

Watched by the server, or by the parent of several front processes. A signal (`signals.NOTICE`) says
the same. Never decides what follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import httpx

from octavo.config import ServerConfig

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
_NO_NOTICE = ("", "false", "none", "0")
"""What a URL answers, with status 200, while there is no notice."""
_HEADERS = {"Metadata-Flavor": "Google"}
"""Asked for by Google's metadata service, and nothing to others."""


async def watch_notice(config: ServerConfig, on_notice: Callable[[], object]) -> None:
    """Calls `on_notice` once, when the notice comes that `config` names; returns at once if it
    names none."""
    where = config.preemption_notice
    if where is None:
        return
    is_url = where.startswith(("http://", "https://"))
    async with httpx.AsyncClient(timeout=LOOK_SECONDS, headers=_HEADERS) as client:
        while not (await _says_so(client, where) if is_url else Path(where).exists()):
            await asyncio.sleep(LOOK_SECONDS)
    logger.warning("%s: this machine is about to be taken away", where)
    on_notice()


async def _says_so(client: httpx.AsyncClient, url: str) -> bool:
    """A service that does not answer gives no notice: it may be restarting."""
    try:
        answer = await client.get(url)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and answer.text.strip().lower() not in _NO_NOTICE
