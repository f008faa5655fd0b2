"""The body of POST /v1/cache/explain: a chat's or a completion's, as it would be sent.

Parsed for `routes.explaining`; never touches the engine.
"""

from __future__ import annotations

from octavo.server.protocol.invocations import InvocationRequest


class ExplainRequest(InvocationRequest):
    """With `messages` a chat, else a completion of one prompt."""
