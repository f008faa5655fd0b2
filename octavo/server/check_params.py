"""Whether parameters would be taken, for routes that generate nothing.

Called by the routes that render and explain prompts.
"""

from __future__ import annotations

from msgspec import structs
from starlette.requests import Request as HttpRequest

from octavo.request import SamplingParams
from octavo.server.auth import check_priority
from octavo.server.protocol.sampling import SamplingFields
from octavo.server.state import server_state


def check_params(request: HttpRequest, body: SamplingFields, params: SamplingParams) -> None:
    """Raises RequestError for what would be refused if it were generated; for routes that generate
    nothing."""
    state = server_state(request)
    check_priority(request, body.priority, state.config)
    bare = structs.replace(params, max_tokens=1, min_tokens=0, structured_outputs=None)
    state.engine.prepare([0], bare)
