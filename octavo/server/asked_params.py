"""What a body asks of sampling, read where it holds nobody up.

Called by routes that generate, render and explain. Never checks it against the model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol

from octavo.request import SamplingParams

MANY_LISTED = 4096
"""Biases that are read in a thread: tens of thousands would hold the event loop too long."""


class SamplingBody(Protocol):
    """A request's, of completions or chats."""

    @property
    def logit_bias(self) -> Mapping[str, float] | None: ...

    def to_params(self, defaults: Mapping[str, Any]) -> SamplingParams: ...


async def asked_params(body: SamplingBody, defaults: Mapping[str, Any]) -> SamplingParams:
    """Returns `body.to_params`, and raises what that does."""
    if len(body.logit_bias or ()) > MANY_LISTED:
        return await asyncio.to_thread(body.to_params, defaults)
    return body.to_params(defaults)
