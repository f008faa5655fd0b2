"""Every option of the engine, with default, type and meaning.

The CLI, the docs and the checks are made from the dataclass; a test pins the list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from octavo.config.fields import check_positive, check_seconds, option, read_address, values_of
from octavo.errors import ConfigError
from octavo.formats import KV_FORMATS, kv_formats
from octavo.kv_events_config import check_ranks, read_kv_events
from octavo.request import PrefixCaching
from octavo.tools.detect import REASONING_PARSERS, TOOL_PARSERS

DTYPES = ("auto", "float32", "bfloat16", "float16")
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
"""vLLM's other words for the same formats."""
ACTIVATION_DTYPES = ("auto", "int8")
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
ATTENTION_BACKENDS = ("auto", "triton", "native", "reference")
MIN_STRETCH, MAX_STRETCH = 1.1, 1000.0
ATTENTION_ALIASES = {"PagedAttention": "auto"}


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
        "auto",
        "number format of the weights; bfloat16 also of what an AMD CPU with AVX-512 BF16 "
        "multiplies them with",
        choices=DTYPES,
        aliases=DTYPE_ALIASES,
    )
    activation_dtype: str = option(
        "auto",
        "what a CPU rounds activations to before it multiplies weights in 4 to 8 bits with them: "
        "int8, by blocks of 32, is 2 to 3 times as fast; auto rounds nothing",
        choices=ACTIVATION_DTYPES,
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
    rank_address: str | None = option(
        None,
        "HOST:PORT of this host that the ranks of octavo rank come to, from other hosts; without "
        "it all ranks are processes of this host",
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
        read = replace(self, **values_of(self))
        read._check()
        return read

    def _check(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a folder, a .gguf file or an id", field="model")
        for name in (
            *("max_num_seqs", "max_num_queued_requests"),
            *("tensor_parallel_size", "data_parallel_size"),
        ):
            check_positive(name, getattr(self, name))
        for name in ("max_model_len", "max_num_batched_tokens", "num_threads"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name, value)
        check_seconds("watchdog_timeout", self.watchdog_timeout)
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
            check_ranks(read_kv_events(self.kv_events_config), self.data_parallel_size)
        self.resolved_attention_backend()
        if self.rank_address is not None:
            self._check_ranks()

    def _check_ranks(self) -> None:
        read_address("rank_address", self.rank_address or "")
        if self.tensor_parallel_size == 1 or self.data_parallel_size > 1:
            raise ConfigError(
                "rank_address is where the ranks of one engine come to: tensor_parallel_size must "
                "be above 1 and data_parallel_size 1, they are "
                f"{self.tensor_parallel_size} and {self.data_parallel_size}",
                field="rank_address",
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
