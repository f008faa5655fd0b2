"""How much may come in: one request's body, and all that are being received together.

Made with the app, asked by `server.body` while it reads. Never keeps a body.
"""

from __future__ import annotations

from octavo.errors import OverloadedError, RequestError
from octavo.server.errors import ApiError

MAX_DEFAULT_BODY_BYTES = 4 * 2**20
_BODY_BYTES_A_TOKEN = 32
"""An id with comma and space has 8; a token of 5 characters, each written as \\u00e4, has 30."""
_BODY_BYTES_BESIDES = 2**20
"""For what stands beside one full context: names, settings, further prompts."""
TOTAL_BODIES = 16
"""Bodies of the largest size that may be received and parsed at once."""


def default_body_bytes(max_model_len: int) -> int:
    """Returns the largest body that a model of this context has use for, at most 4 MiB."""
    wanted = _BODY_BYTES_BESIDES + _BODY_BYTES_A_TOKEN * max_model_len
    return min(wanted, MAX_DEFAULT_BODY_BYTES)


def check_prompt(num_tokens: int, most: int | None) -> None:
    """Raises RequestError if a prompt has more tokens than the operator takes."""
    if most is not None and num_tokens > most:
        message = (
            f"the prompt has {num_tokens} tokens, and this server takes at most {most} "
            "(--max-prompt-tokens); shorten it"
        )
        raise RequestError(message, param="prompt", code="prompt_too_long")


def check_messages(num_messages: int, most: int | None) -> None:
    """Raises RequestError if a chat has more messages than the operator takes."""
    if most is not None and num_messages > most:
        message = (
            f"there are {num_messages} messages, and this server takes at most {most} "
            "(--max-messages); send fewer"
        )
        raise RequestError(message, param="messages", code="too_many_messages")


class BodyRoom:
    """Counts the bytes of bodies that are here but not parsed yet. One event loop's."""

    def __init__(self, max_body_bytes: int) -> None:
        self.max_body_bytes = max_body_bytes
        self.max_total_bytes = TOTAL_BODIES * max_body_bytes
        self.num_bytes = 0

    def check(self, num_bytes: int) -> None:
        """Raises ApiError (413) if a body of so many bytes is too large."""
        if num_bytes > self.max_body_bytes:
            limit = self.max_body_bytes
            message = (
                f"the request body has more than {limit} bytes; send less, or start the server "
                "with a larger --max-body-bytes"
            )
            raise ApiError(413, message, code="body_too_large")

    def take(self, num_bytes: int) -> None:
        """Makes room for more bytes of a body. Raises OverloadedError."""
        if self.num_bytes + num_bytes > self.max_total_bytes:
            raise OverloadedError(
                f"request bodies of {self.num_bytes} bytes are being received already (limit "
                f"{self.max_total_bytes}); try again later"
            )
        self.num_bytes += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """The bytes have been parsed, or dropped."""
        self.num_bytes -= num_bytes
