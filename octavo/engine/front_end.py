"""What stands before an engine core: the model's files, its tokenizer, text in and text out.

Owned by LLM and AsyncLLM, which differ only in where the core runs. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.engine.input_processor import InputProcessor
from octavo.engine.output_processor import OutputProcessor
from octavo.engine.tokenizer import Tokenizer, eos_token_ids, load_tokenizer
from octavo.errors import RequestError
from octavo.models.registry import read_spec
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
        self.spec, _ = read_spec(self.files.config)
        self._tokenizer = _load_tokenizer(config, self.files)
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

    def processors(self, max_model_len: int) -> tuple[InputProcessor, OutputProcessor]:
        """Returns the way in and the way out, once the core has fitted the context length."""
        eos = eos_token_ids(self.files.generation_config, self._tokenizer)
        return (
            InputProcessor(
                self._tokenizer,
                max_model_len=max_model_len,
                vocab_size=self.spec.vocab_size,
                eos_token_ids=eos,
            ),
            OutputProcessor(self._tokenizer),
        )


def _load_tokenizer(config: EngineConfig, files: ModelFiles) -> Tokenizer | None:
    if config.skip_tokenizer_init:
        return None
    tokenizer = load_tokenizer(config.tokenizer or files.path)
    if config.chat_template is None:
        return tokenizer
    path = Path(config.chat_template)
    is_file = "{" not in config.chat_template and path.is_file()
    source = path.read_text(encoding="utf-8") if is_file else config.chat_template
    return tokenizer.with_chat_template(source)
