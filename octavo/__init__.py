"""Octavo: a serving engine for mixture-of-experts language models.

Owns the public surface: the names below, loaded when first used, so that `import octavo` and
`octavo --help` stay fast. Everything that is not listed here may change.
"""

from __future__ import annotations

import importlib

from octavo.version import __version__

TYPE_CHECKING = False  # which spares the import of typing: this comes before all else
if TYPE_CHECKING:
    from typing import Any

    from octavo.async_llm import AsyncLLM
    from octavo.config import AttentionConfig, EngineConfig
    from octavo.constraint import StructuredOutputsParams
    from octavo.errors import (
        CapacityError,
        ChatTemplateError,
        ConfigError,
        ContextLengthError,
        EngineDeadError,
        ModelError,
        ModelNotFoundError,
        OctavoError,
        OverloadedError,
        RequestError,
        UnsupportedModelError,
        WeightsError,
    )
    from octavo.llm import LLM
    from octavo.outputs import CompletionOutput, RequestOutput
    from octavo.pooling import PoolingParams, PoolingRequestOutput
    from octavo.request import SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "AttentionConfig",
    "CapacityError",
    "ChatTemplateError",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "EngineConfig",
    "EngineDeadError",
    "ModelError",
    "ModelNotFoundError",
    "OctavoError",
    "OverloadedError",
    "PoolingParams",
    "PoolingRequestOutput",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "UnsupportedModelError",
    "WeightsError",
    "__version__",
]

_HOMES = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.async_llm",
    "AttentionConfig": "octavo.config",
    "EngineConfig": "octavo.config",
    "CompletionOutput": "octavo.outputs",
    "RequestOutput": "octavo.outputs",
    "PoolingParams": "octavo.pooling",
    "PoolingRequestOutput": "octavo.pooling",
    "SamplingParams": "octavo.request",
    "StructuredOutputsParams": "octavo.constraint",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its home at first use."""
    if name not in __all__:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "octavo.errors")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
