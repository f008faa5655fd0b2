"""What is known of one HTTP exchange while it lasts.

Made by `access`, filled in by whoever knows, read by the access log, traces and the audit log.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import Scope

from octavo.server.tracing.middleware import Trace


@dataclass(slots=True)
class Exchange:
    """What the log line tells of one exchange; tokens are those of all prompts and sequences.

    Routes find it as `request.state.exchange` and fill in what they know.
    """

    request_id: str
    num_prompt_tokens: int | None = None
    """Known once a generation has begun."""
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_token_seconds: float | None = None
    """From the arrival of the first of its prompts that got one."""
    is_message: bool = False
    """Whether its route is one of Anthropic's API."""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    """That the answer gets besides its own."""
    guarded: dict[str, int] | None = None
    """How often its guard has refused or rewritten, by `input_refused` and the like."""
    code: str = ""
    """Of its error, in OpenAI's words, whatever form the client got it in."""
    sent: str | None = None
    """The body, where texts are audited."""
    told: dict[int, list[str]] | None = None
    """What its answers gained, where texts are audited."""
    num_body_bytes: int | None = None
    """Of a body that was read as JSON."""
    reason: str = ""
    """Why it failed, if its answer had begun by then; else the answer itself tells."""
    tokenising: tuple[float, float] | None = None
    """When texts became ids: beginning and end, seconds of the monotonic clock."""
    trace: Trace | None = None
    """Where its way is noted, if it is traced."""
    later: Callable[[], None] | None = None
    """Tells the audit log of it, where its work goes on behind the answer."""
    is_going_on: bool = False
    """Whether its work goes on behind the answer; `ended` says that it is over."""
    started: float = field(default_factory=time.monotonic)

    def ended(self) -> None:
        """Its work is over, that went on behind the answer."""
        self.is_going_on = False
        if self.later is not None:
            self.later()
            self.later = None


def client_of(scope: Scope) -> str:
    """Returns the address that a request came from."""
    host, port = scope.get("client") or ("unknown", 0)
    return f"{host}:{port}"
