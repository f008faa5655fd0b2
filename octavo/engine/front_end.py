"""What stands before an engine core: the model's files, its tokenizer, text in and text out.

Owned by LLM and AsyncLLM, which differ only in where the core runs. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.input_processor import InputProcessor
from octavo.engine.memory import check_context
from octavo.engine.model_kind import with_kind
from octavo.engine.output_processor import OutputProcessor
from octavo.engine.pairs import PairWriter
from octavo.engine.tokenizer import Tokenizer, eos_token_ids, find_tokenizer
from octavo.engine.vectors import VectorReader
from octavo.errors import ChatTemplateError, ConfigError, ModelError, RequestError
from octavo.grammar import Checker
from octavo.models.registry import find_family, read_spec
from octavo.tools.answer_parser import AnswerFormat
from octavo.tools.detect import answer_format
from octavo.weights.hub import ModelFiles, resolve_model

_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What of a generation config becomes a default of requests, as in vLLM."""


class FrontEnd:
    """Made before the core loads: it finds the model, and refuses what cannot work early."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config.resolve()
        self.files: ModelFiles = resolve_model(
            config.model,
            revision=config.revision,
            download_dir=config.download_dir,
            load_format=config.load_format,
            seed=config.seed,
        )
        find_family(self.files.config)  # refused before a tokenizer is looked for
        self._tokenizer = _load_tokenizer(config, self.files)
        self.files = with_kind(self.config, self.files, self._tokenizer)
        self.spec, _ = read_spec(self.files.config, self.files.modules)
        check_context(self.config, self.spec)
        if self._tokenizer is not None:
            _check_special_ids(self._tokenizer, self.spec.vocab_size)
        self._checker = self._tokenizer and Checker(self._tokenizer.special_strings)
        self.answer_format = format_of(self.config, self._tokenizer)
        """How the model writes calls and reasoning; None without a tokenizer."""
        self.default_sampling_params: Mapping[str, Any] = {
            name: self.files.generation_config[name]
            for name in _SAMPLING_DEFAULTS
            if self.config.generation_config == "auto"
            and self.files.generation_config.get(name) is not None
        }

    @property
    def optional_tokenizer(self) -> Tokenizer | None:
        """None if the engine runs on token ids alone."""
        return self._tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises RequestError if the engine runs on token ids alone."""
        if self._tokenizer is None:
            raise RequestError(
                "the engine runs without a tokenizer (skip_tokenizer_init): give token ids",
                param="prompt",
            )
        return self._tokenizer

    @property
    def vectors(self) -> VectorReader | None:
        """How vectors are told; None for a model that generates."""
        pooling = self.spec.pooling
        return None if pooling is None else VectorReader(pooling, self.spec.hidden_size)

    @cached_property
    def pairs(self) -> PairWriter:
        """How a query and a document become a prompt, of a model that scores them. Raises
        RequestError if the engine runs on token ids alone."""
        assert self.spec.pooling is not None
        return PairWriter(self.tokenizer, self.spec.pooling)

    def warm_up(self) -> None:
        """Loads what the first grammar needs; takes a tenth of a second."""
        if self._checker is not None:
            self._checker.load()

    def processors(self, max_model_len: int) -> tuple[InputProcessor, OutputProcessor]:
        """Returns the way in and the way out, once the core has fitted the context length."""
        eos = eos_token_ids(self.files.generation_config, self._tokenizer)
        return (
            InputProcessor(
                self._tokenizer,
                max_model_len=max_model_len,
                vocab_size=self.spec.vocab_size,
                eos_token_ids=eos,
                pooling=self.spec.pooling,
                checker=self._checker,
            ),
            OutputProcessor(self._tokenizer),
        )


def format_of(config: EngineConfig, tokenizer: Tokenizer | None) -> AnswerFormat | None:
    """Returns how a model writes calls and reasoning whose tokenizer this is; None without one."""
    if tokenizer is None:
        return None
    return answer_format(
        tokenizer.chat_template,
        tokenizer.special_strings,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        token_id=tokenizer.token_id,
    )


def _check_special_ids(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ModelError if the tokenizer's own ends are ids that the model does not have."""
    ids = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    for role, token_id in ids.items():
        if token_id is not None and token_id >= vocab_size:
            raise ModelError(
                f"the tokenizer's {role} {tokenizer.special_tokens[role]!r} has the id {token_id}, "
                f"and the model's vocabulary has {vocab_size} tokens: the two do not belong "
                "together; give the model's own with --tokenizer"
            )


def _load_tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    tokenizer = find_tokenizer(config, files)
    if config.chat_template is None:
        return tokenizer
    return _with_given_template(tokenizer, config.chat_template)


def _with_given_template(tokenizer: Tokenizer, given: str) -> Tokenizer:
    """Returns the tokenizer with the operator's template, a file or text. Raises ConfigError on
    what would otherwise become the prompt, or the refusal, of every chat."""
    # Text of a template has a brace, and names of files hardly ever do.
    is_text = "{" in given and not (
        "\n" not in given and len(given) < 256 and Path(given).is_file()
    )
    where = "chat_template" if is_text else f"chat_template {given!r}"
    try:
        source = given if is_text else Path(given).expanduser().read_text(encoding="utf-8")
        if "{" not in source:
            raise ConfigError(
                f"{where} has no {{{{ ... }}}} or {{% ... %}}, so it would be the prompt of every "
                "chat; give a Jinja template",
                field="chat_template",
            )
        found = tokenizer.with_chat_template(source)
        found.chat_renderer  # noqa: B018 - compiled now, so that a mistake shows now
    except ChatTemplateError as error:
        raise ConfigError(f"{where}: {error}", field="chat_template") from error
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(
            f"{where} cannot be read: {reason}; give a file in UTF-8, or a template's text",
            field="chat_template",
        ) from error
    return found
