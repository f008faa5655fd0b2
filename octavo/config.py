"""Every option of the engine and of the server, with default, type and meaning, in one place.

The CLI, the docs and the checks are made from these dataclasses; a test pins the list. The only
environment variables that Octavo reads are read here.
"""

from __future__ import annotations

import os
import re
import typing
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from octavo.errors import ConfigError
from octavo.formats import KV_FORMATS, kv_formats
from octavo.kv_events_config import read_kv_events
from octavo.option_values import kind_of, read_value
from octavo.plain_keys import all_keys
from octavo.request import MAX_INT, PrefixCaching
from octavo.tools.detect import REASONING_PARSERS, TOOL_PARSERS
from octavo.traces_config import check_traces

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
"""vLLM's other words for the same formats."""
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
ATTENTION_BACKENDS = ("auto", "triton", "native", "reference")
MIN_STRETCH, MAX_STRETCH = 1.1, 1000.0
MAX_SECONDS = 86400
"""The longest that an option may ask to wait."""
ATTENTION_ALIASES = {"PagedAttention": "auto"}


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field whose help text the CLI and the docs show; no repr shows a secret."""
    is_shown = not more.get("is_secret", False)
    return field(default=default, repr=is_shown, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """Which attention back end runs. `backend` is one of ATTENTION_BACKENDS or an alias."""

    backend: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All options of one engine. `resolve()` checks them against each other."""

    model: str = option("", "Hugging Face id, local folder, .gguf file, demo or demo-moe")
    tokenizer: str | None = option(
        None, "folder, .gguf file or Hugging Face id of the tokenizer, if not the model's own"
    )
    revision: str | None = option(None, "branch, tag or commit of a Hugging Face id")
    download_dir: str | None = option(None, "where downloaded models are kept")
    dtype: str = option(
        "auto", "number format of the weights", choices=DTYPES, aliases=DTYPE_ALIASES
    )
    load_format: str = option("auto", "format of the weights files", choices=LOAD_FORMATS)
    quantization: str | None = option(
        None,
        "fp8, int8 or int4 to quantise weights when they are loaded; of a checkpoint that is "
        "quantised its method, which is checked, and found without it",
        also=("-q",),
    )
    max_model_len: int | None = option(
        None, "context length, like 4096 or 4K; fitted to the memory if auto", unit="tokens"
    )
    allow_longer_than_trained: bool = option(
        False, "let max_model_len exceed what the model was trained for"
    )
    max_num_seqs: int = option(256, "sequences that run at once")
    max_num_batched_tokens: int | None = option(
        None,
        "tokens computed in one step; 512 on a CPU, 8192 on a GPU with the memory for it",
        unit="tokens",
    )
    step_stretch: float | None = option(
        None,
        "a step that computes prompts takes at most so many times what its decodes alone take, "
        "1.1 or more, so that streams keep their pace; 0: as long as it likes; auto is 2.2, and 0 "
        "for LLM, where throughput alone counts",
    )
    max_num_queued_requests: int = option(4096, "requests that may wait before 503 is answered")
    block_size: int = option(16, "tokens in a block", choices=(16,))
    gpu_memory_utilization: float = option(0.9, "share of the device's memory that may be used")
    kv_cache_memory_bytes: int | None = option(
        None, "absolute size of the KV cache in bytes", also=("--kv-cache-memory",)
    )
    kv_cache_dtype: str = option(
        "auto",
        f"format of keys and values: auto, {', '.join(KV_FORMATS)}; or of each, like int8/int4",
    )
    prefix_caching: PrefixCaching = option(
        "auto", "share computed prefixes between requests", choices=("auto", "on", "off")
    )
    kv_events_config: str | None = option(
        None, "JSON object: where to publish which prefixes are cached, as vLLM's", is_object=True
    )
    tensor_parallel_size: int = option(1, "devices that share every layer", also=("-tp",))
    data_parallel_size: int = option(
        1,
        "engines on this host, each with all of the model; requests go where their prefix is",
        also=("-dp",),
    )
    enable_expert_parallel: bool = option(
        False,
        "with tensor_parallel_size: each device has some experts whole, not a part of each",
        also=("-ep",),
    )
    attention_backend: str | AttentionConfig = option("auto", "kernel that computes attention")
    enforce_eager: bool = option(False, "never capture device graphs")
    deterministic: bool = option(
        False, "force the slower kernels whose bits never depend on the batch"
    )
    device: str = option("auto", "device that computes", choices=("auto", "cuda", "cpu"))
    num_threads: int | None = option(None, "CPU threads; all cores if not given")
    watchdog_timeout: float = option(
        60.0,
        "seconds without progress of a step after which the engine is ended; 10 times as long "
        "while it builds a kernel; 0 waits for ever",
    )
    seed: int = option(0, "of requests that bring none, and of dummy weights")
    chat_template: str | None = option(None, "Jinja file or text instead of the model's template")
    tool_call_parser: str = option(
        "auto",
        "format in which the model calls tools; auto finds it in the chat template",
        choices=("auto", "none", *TOOL_PARSERS),
    )
    reasoning_parser: str = option(
        "auto",
        "format of the model's reasoning; auto finds it in the chat template",
        choices=("auto", "none", *REASONING_PARSERS),
        aliases={"": "auto"},
    )
    generation_config: str = option(
        "auto",
        "defaults of sampling: auto takes the model's, vllm only those of the API",
        choices=("auto", "vllm"),
    )
    runner: str = option(
        "auto",
        "whether the model generates or makes vectors and scores of texts; auto follows the "
        "checkpoint, pooling makes an embedding model of one that says nothing",
        choices=("auto", "generate", "pooling"),
    )
    label_tokens: tuple[str, ...] = option(
        (),
        "a reranker that answers with one of two tokens: the one for relevant, and the other, as "
        "in yes,no",
        separator=",",
    )
    skip_tokenizer_init: bool = option(False, "token ids in, token ids out")
    poison_freed_blocks: bool = option(
        False, "test mode: fill freed blocks with NaN", is_hidden=True
    )

    def resolve(self) -> EngineConfig:
        """Returns a copy whose values have their own types and make sense, each and together.

        Sizes may be given as text, "4GiB". Raises ConfigError naming the field.
        """
        read = replace(self, **_values_of(self))
        read._check()
        return read

    def _check(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a folder, a .gguf file or an id", field="model")
        for name in (
            *("max_num_seqs", "max_num_queued_requests"),
            *("tensor_parallel_size", "data_parallel_size"),
        ):
            _positive(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None:
                _positive(name, value)
        _seconds("watchdog_timeout", self.watchdog_timeout)
        stretch = self.step_stretch
        if stretch is not None and stretch != 0 and not MIN_STRETCH <= stretch <= MAX_STRETCH:
            raise ConfigError(
                f"step_stretch must be 0 or in {MIN_STRETCH}..{MAX_STRETCH}, got {stretch}",
                field="step_stretch",
            )
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be above 0 and at most 1, got "
                f"{self.gpu_memory_utilization}",
                field="gpu_memory_utilization",
            )
        if self.kv_cache_dtype != "auto":
            kv_formats(self.kv_cache_dtype)
        if self.kv_events_config is not None:
            read_kv_events(self.kv_events_config)
        self.resolved_attention_backend()
        if self.kv_events_config is not None and self.data_parallel_size > 1:
            raise ConfigError(
                "kv_events_config tells of one engine, and data_parallel_size is "
                f"{self.data_parallel_size}: leave one out; a fleet routes its requests itself",
                field="kv_events_config",
            )

    def resolved_attention_backend(self) -> str:
        """Returns one of ATTENTION_BACKENDS. Raises ConfigError with the list of valid names."""
        given = self.attention_backend
        name = given.backend if isinstance(given, AttentionConfig) else given
        name = ATTENTION_ALIASES.get(name, name)
        if name not in ATTENTION_BACKENDS:
            valid = ", ".join((*ATTENTION_BACKENDS, *ATTENTION_ALIASES))
            raise ConfigError(
                f"attention_backend {name!r} is unknown; valid are {valid}",
                field="attention_backend",
            )
        return name


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All options of the HTTP server."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: tuple[str, ...] = option(
        (), "keys that are let in (also OCTAVO_API_KEY)", is_secret=True
    )
    api_key_file: str | None = option(None, "file of keys that are let in, one a line")
    operator_key: tuple[str, ...] = option(
        (),
        "keys that may also read metrics and reset the cache (also OCTAVO_OPERATOR_KEY)",
        is_secret=True,
    )
    operator_key_file: str | None = option(None, "file of operator keys, one a line")
    keys: str | None = option(
        None, "file of keys (their hashes), tenants with limits, and issuers of tokens"
    )
    public_metrics: bool = option(False, "answer /metrics and /version without a key")
    metrics_port: int | None = option(
        None, "second port that answers /metrics, /health and /ready alone, in plain HTTP, no key"
    )
    expert_metrics: bool = option(
        False, "tell in /metrics of every expert of every layer, which are thousands of series"
    )
    otlp_traces_endpoint: str | None = option(
        None, "collector of OpenTelemetry traces, like http://localhost:4317; extra otel"
    )
    otlp_traces_protocol: str = option(
        "auto",
        "how traces travel; auto is http for port 4318 and paths, else grpc",
        choices=("auto", "grpc", "http"),
    )
    otlp_traces_sampling: float = option(
        1.0, "share of requests that are traced, if their traceparent does not say"
    )
    allow_priority: str = option(
        "0..0", "priorities that clients may ask for, like -10..10, or all; operators may always"
    )
    served_model_name: tuple[str, ...] = option((), "names of the model in the API")
    api_processes: int = option(
        1, "processes that speak HTTP, over one engine: for more tokens than one core can send"
    )
    max_body_bytes: int | None = option(
        None, "largest request body; as the context needs if not given, at most 4 MiB"
    )
    store_dir: str | None = option(
        None,
        "folder of stored responses, files and batches; in the user's data folder if not given",
    )
    max_store_bytes: int = option(
        10 * 2**30, "most bytes of stored responses, files and batches; 0 stores nothing"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "origins that browsers may call from, or a JSON list of them", is_json=True
    )
    ssl_certfile: str | None = option(None, "certificate (PEM, with its chain): serve HTTPS")
    ssl_keyfile: str | None = option(None, "key of the certificate, if not in the same file")
    enable_ssl_refresh: bool = option(
        False, "read the certificate again when its file changes; new connections get it"
    )
    disable_access_log_for_endpoints: tuple[str, ...] = option(
        (), "paths whose requests are not logged, like /health,/metrics", separator=","
    )
    log_format: Literal["text", "json"] = option("text", "log lines", choices=("text", "json"))
    log_level: str = option(
        "info", "least severe log line", choices=("debug", "info", "warning", "error")
    )
    disable_log_stats: bool = option(False, "no line on throughput every ten seconds under load")
    shutdown_timeout: float = option(30.0, "seconds that running requests get at shutdown")
    preemption_notice: str | None = option(
        None,
        "file that appears, or URL that answers, when this machine is about to be taken away: "
        "requests that have not begun are handed back",
    )
    debug_loop_holds: bool = option(
        False, "debug mode: measure how long one callback holds the event loop, log and export it"
    )

    def resolve(self) -> ServerConfig:
        """Returns a copy in its own types, with the keys of files and environment added.

        Raises ConfigError.
        """
        return replace(self, **_values_of(self))._resolved()

    def _resolved(self) -> ServerConfig:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}", field="port")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            message = f"metrics_port must be in 0..65535, got {self.metrics_port}"
            raise ConfigError(message, field="metrics_port")
        if self.metrics_port and self.metrics_port == self.port:
            message = f"metrics_port is port, {self.port}; give the metrics another one"
            raise ConfigError(message, field="metrics_port")
        self._check_texts()
        if self.ssl_certfile is None and (self.ssl_keyfile or self.enable_ssl_refresh):
            field = "ssl_keyfile" if self.ssl_keyfile else "enable_ssl_refresh"
            raise ConfigError(f"{field} needs ssl_certfile, the certificate", field=field)
        _positive("api_processes", self.api_processes)
        if self.max_body_bytes is not None:
            _positive("max_body_bytes", self.max_body_bytes)
        if self.max_store_bytes < 0:
            message = f"max_store_bytes must be at least 0, got {self.max_store_bytes}"
            raise ConfigError(message, field="max_store_bytes")
        _seconds("shutdown_timeout", self.shutdown_timeout)
        check_traces(self.otlp_traces_endpoint, self.otlp_traces_sampling)
        _ = self.priority_range
        keys = {
            name: all_keys(
                name,
                getattr(self, name),
                getattr(self, f"{name}_file"),
                os.environ.get(f"OCTAVO_{name.upper()}"),
            )
            for name in ("api_key", "operator_key")
        }
        if both := set(keys["api_key"]) & set(keys["operator_key"]):
            message = f"{len(both)} of the api_key are operator_key, too; a key has one role"
            raise ConfigError(message, field="operator_key")
        return replace(self, **keys, api_key_file=None, operator_key_file=None)

    @property
    def has_keys(self) -> bool:
        """Whether somebody needs a key."""
        return bool(self.api_key or self.operator_key or self.keys)

    @property
    def priority_range(self) -> tuple[int, int]:
        """Lowest and highest priority that clients may ask for. Raises ConfigError."""
        if self.allow_priority == "all":
            return -MAX_INT, MAX_INT
        found = re.fullmatch(r"(-?[0-9]{1,10})\.\.(-?[0-9]{1,10})", self.allow_priority)
        low, high = (int(found[1]), int(found[2])) if found else (1, 0)
        if not -MAX_INT <= low <= 0 <= high <= MAX_INT:
            raise ConfigError(
                "allow_priority must be all or a range that holds 0, like -10..10, got "
                f"{self.allow_priority!r}",
                field="allow_priority",
            )
        return low, high

    def _check_texts(self) -> None:
        for name, pattern, wanted in _TEXT_CHECKS:
            for text in getattr(self, name):
                if not re.fullmatch(pattern, text):
                    raise ConfigError(f"{name} must be {wanted}, got {text!r}", field=name)


_TEXT_CHECKS = (
    (
        "allowed_origins",
        r"\*|null|[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+",
        "* or origins like https://app.example.com, without a path",
    ),
    ("disable_access_log_for_endpoints", r"/\S*", "paths that begin with /"),
    ("served_model_name", r"(?s).*\S.*", "names that are not empty"),
)
"""Fields that hold texts, the pattern of each text, and its description."""


def cache_dir() -> str:
    """Where Octavo keeps what it makes: OCTAVO_CACHE, else XDG_CACHE_HOME/octavo, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.environ.get("OCTAVO_CACHE") or os.path.join(base, "octavo")


def tuned_dir() -> str:
    """Where `octavo tune` leaves launch shapes and the engine looks for them."""
    return os.path.join(cache_dir(), "tuned")


def store_dir() -> str:
    """Where a server keeps what clients leave with it: XDG_DATA_HOME/octavo/store, else
    ~/.local/share. No cache: it cannot be made again."""
    home = os.path.expanduser("~")
    base = os.environ.get("XDG_DATA_HOME") or os.path.join(home, ".local", "share")
    return os.path.join(base, "octavo", "store")


def _values_of(config: Any) -> dict[str, Any]:
    """Returns the fields of a config, each read by its kind. Raises ConfigError."""
    hints = typing.get_type_hints(type(config))
    return {
        one.name: read_value(
            one.name,
            kind_of(one.name, hints[one.name], one.metadata),
            one.metadata,
            getattr(config, one.name),
        )
        for one in fields(config)
    }


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}", field=name)


def _seconds(name: str, value: float) -> None:
    if not 0 <= value <= MAX_SECONDS:
        message = f"{name} must be from 0 to {MAX_SECONDS} seconds, got {value!r}"
        raise ConfigError(message, field=name)
