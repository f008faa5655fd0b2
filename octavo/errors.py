"""The one exception tree of Octavo: what went wrong, which value, which limit, what to do.

Raised everywhere, caught at the faces (`server`, `cli`, `llm`); never carries a tensor.

    OctavoError
    |-- ConfigError               an option of the operator: refused before anything is loaded
    |   `-- CapacityError         the model or the cache does not fit the memory
    |-- ModelError                the model itself
    |   |-- ModelNotFoundError    no such folder, file or hub id
    |   |-- UnsupportedModelError a family, format or feature that Octavo does not know
    |   `-- WeightsError          a missing, surplus, truncated or misshapen tensor
    |-- RequestError              one request of a user: HTTP 400, nothing else is harmed
    |   |-- ContextLengthError    prompt (and max_tokens) longer than the context
    |   `-- ChatTemplateError     the template refused the messages
    |-- OverloadedError           no room in the queue: HTTP 503 with Retry-After
    |-- SlowReaderError           a client that does not read its stream: the stream ends
    |-- OutOfMemoryError          no room on the device for a step: the engine computes it again
    `-- EngineDeadError           the engine process ended: HTTP 503, health fails
"""

from __future__ import annotations


class OctavoError(Exception):
    """Base of all errors that Octavo raises on purpose."""


class ConfigError(OctavoError):
    """An option has a value that cannot be used. `field` names the option."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class CapacityError(ConfigError):
    """Weights or KV cache do not fit; the message says how much is missing and what would fit."""


class ModelError(OctavoError):
    """The model cannot be used."""


class ModelNotFoundError(ModelError):
    """There is no such folder, file or hub id."""


class UnsupportedModelError(ModelError):
    """The family, format or feature is not known; the message lists what is."""


class WeightsError(ModelError):
    """A weights file is broken or does not match the config; the message names the tensor."""


class RequestError(OctavoError):
    """A request cannot be served as it is. `param` names the field of the request."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ContextLengthError(RequestError):
    """Prompt plus wanted output do not fit the context."""

    def __init__(self, message: str, *, param: str | None = "prompt") -> None:
        super().__init__(message, param=param, code="context_length_exceeded")


class ChatTemplateError(RequestError):
    """The chat template is malformed or refused the messages."""


class OverloadedError(OctavoError):
    """The waiting queue is full. `retry_after_seconds` is a hint for the client."""

    def __init__(self, message: str, *, retry_after_seconds: int = 1) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class PreemptedError(OverloadedError):
    """The machine is taken away; nothing of the request was done, it may be sent again at once."""

    def __init__(self, message: str) -> None:
        super().__init__(message, retry_after_seconds=0)


class SlowReaderError(OctavoError):
    """Whoever asked is too far behind with reading; nothing more is kept for it."""


class OutOfMemoryError(OctavoError):
    """A step did not fit the device's memory, not even in parts."""


class EngineDeadError(OctavoError):
    """The engine process has ended; the message carries its last error."""


_MAX_SHOWN = 200


def shown(value: object) -> str:
    """Returns what an error's message repeats of a refused value: its beginning, where it is
    long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
