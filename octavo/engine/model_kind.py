"""What a model is used for: to generate, or to make vectors and scores of texts.

Called by the front end, before anything is loaded, and by `octavo plan`. The checkpoint says it;
`--runner` and `--label-tokens` say more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.models.pooling_spec import read_pooling
from octavo.weights.hub import ModelFiles

if TYPE_CHECKING:  # `octavo plan` has no use for tokenizers
    from octavo.engine.tokenizer import Tokenizer

LAST_TOKEN: list[dict[str, Any]] = [
    {"type": "Pooling", "config": {"pooling_mode": "lasttoken"}},
    {"type": "Normalize", "config": {}},
]
"""For a decoder that is to be an embedding model, and says nothing of how."""


def with_kind(config: EngineConfig, files: ModelFiles, tokenizer: Tokenizer | None) -> ModelFiles:
    """Returns the files with the modules that the options ask for. Raises ConfigError."""
    if config.label_tokens:
        return replace(files, modules=[_label_module(config, tokenizer)])
    if config.runner == "generate":
        files = replace(files, modules=[])
        pooling = read_pooling(files.config, [])
        if pooling is not None:
            raise ConfigError(
                f"runner is generate, but {files.name} is {pooling.described}: it has no head for "
                "tokens; leave the option out",
                field="runner",
            )
    if config.runner == "pooling" and read_pooling(files.config, files.modules) is None:
        return replace(files, modules=LAST_TOKEN)
    return files


def _label_module(config: EngineConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    words = config.label_tokens
    if config.runner == "generate":
        raise ConfigError(
            "label_tokens make a model score, and runner is generate; leave out one of them",
            field="label_tokens",
        )
    if len(words) > 2:
        raise ConfigError(
            f"label_tokens names {len(words)} tokens; give the one for relevant, and perhaps the "
            "one for irrelevant, as in yes,no",
            field="label_tokens",
        )
    if tokenizer is None:
        raise ConfigError(
            "label_tokens needs a tokenizer; leave out skip_tokenizer_init", field="label_tokens"
        )
    ids = [_token_id(tokenizer, word) for word in words]
    names = ("true_token_id", "false_token_id")
    return {"type": "LogitScore", "config": dict(zip(names, ids, strict=False))}


def _token_id(tokenizer: Tokenizer, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"label_tokens names {word!r}, which is {len(ids)} tokens of this model; give texts "
            "of one token each",
            field="label_tokens",
        )
    return ids[0]
