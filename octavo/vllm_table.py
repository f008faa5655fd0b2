"""The options of vLLM that have no field in config/, each with what is to be said of it.

Read by vllm_options.py and the command line. Never holds code but what makes its rows shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Face = Literal["engine", "server"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmOption:
    """One option that has no field in config/."""

    name: str
    """As a keyword argument; the command line's flag has dashes."""
    reason: str
    """Why it is refused, and the way out."""
    face: Face = "engine"
    is_flag: bool = False
    is_list: bool = False
    """Whether several values may stand after the flag."""
    neutral: tuple[Any, ...] = ()
    """Values that ask for what is so anyway."""
    note: str = ""
    """What is so anyway; empty where the value asks for nothing at all."""
    short: tuple[str, ...] = ()
    """Other spellings of the flag."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _flags(
    reason: str, *names: str, so: bool = False, note: str = "", face: Face = "engine"
) -> list[VllmOption]:
    """Switches whose value `so` asks for what is so anyway; of True it is said, as `note` or
    `reason` have it."""
    said = note or (reason if so else "")
    return [
        VllmOption(name=name, reason=reason, is_flag=True, neutral=(so,), note=said, face=face)
        for name in names
    ]


def _values(
    reason: str,
    *names: str,
    so: tuple[Any, ...] = (),
    note: str = "",
    face: Face = "engine",
    short: tuple[str, ...] = (),
    is_list: bool = False,
) -> list[VllmOption]:
    return [
        VllmOption(
            name=name,
            reason=reason,
            neutral=so,
            note=note,
            face=face,
            short=short,
            is_list=is_list,
        )
        for name in names
    ]


_TOOLS = "a request's tools are always called as its tool_choice says"
_REASONING = "reasoning is told from the text where the model's format is known"
_PLUGINS = "formats of tool calls and reasoning are rows of a table; none runs code of its own"
_SCHEMAS = "there is one library for structured output; requests say all else"
_LORA = "LoRA adapters are not built yet"
_DRAFTS = "speculative decoding is not built yet"
_ONE_HOST = "one engine on one host; --tensor-parallel-size shares a model between its GPUs"
_COPIES = "--data-parallel-size starts the engines of a host, and its router is their only one"
_EXPERTS = "experts lie in equal shares on the ranks of tensor parallelism, in their order"
_TEXT = "only text is generated, from text"
_KINDS = "the checkpoint says what a model makes of texts; --runner pooling embeds with any"
_POOLING = "the checkpoint's modules.json says how hidden states are pooled"
_SWAP = "nothing is moved to the host's memory; what loses its blocks is computed again"
_GRAPHS = "graphs of all small steps are captured at start; --enforce-eager turns them off"
_STEPS = "one token budget is shared by all requests of a step; see --max-num-batched-tokens"
_CODE = "families of models are built in; none runs code of its own"
_LOGS = "requests have an access line; prompts are never logged"
_CORS = "every method and header is allowed to --allowed-origins, cookies are not used"
_TRACES = "traces have all details; see --otlp-traces-endpoint"
_MODEL_FILES = "a model is read as its folder or file says"

_TABLE: list[VllmOption] = [
    VllmOption(
        name="enable_auto_tool_choice",
        reason=_TOOLS,
        is_flag=True,
        neutral=(True, False),
        note=_TOOLS,
    ),
    *_flags(
        "tools stay in the prompt, so that its prefix is the same whatever is chosen",
        "exclude_tools_when_tool_choice_none",
    ),
    *_values(_PLUGINS, "tool_parser_plugin", so=("",), face="server"),
    *_values("the server has no tools of its own", "tool_server", face="server"),
    *_flags("use --reasoning-parser", "enable_reasoning", so=True, note=_REASONING),
    *_values(_PLUGINS, "reasoning_parser_plugin", so=("",)),
    *_values(_SCHEMAS, "guided_decoding_backend", "structured_outputs_config", so=("auto", {})),
    *_values(_SCHEMAS, "guided_decoding_disable_fallback", "logits_processor_pattern"),
    *_flags(_LORA, "enable_lora", "enable_lora_bias", "fully_sharded_loras"),
    *_values(_LORA, "max_loras", "max_lora_rank", "max_cpu_loras", "lora_extra_vocab_size"),
    *_values(_LORA, "lora_dtype", so=("auto",)),
    *_values(_LORA, "lora_modules", "default_mm_loras", is_list=True),
    *_flags(_LORA, "enable_prompt_adapter"),
    *_values(_DRAFTS, "speculative_config", "speculative_model", "num_speculative_tokens"),
    *_values(_DRAFTS, "num_lookahead_slots", so=(0,)),
    *_values(_ONE_HOST, "pipeline_parallel_size", so=(1,), short=("-pp",)),
    *_values(_ONE_HOST, "decode_context_parallel_size", so=(1,), short=("-dcp",)),
    *_values(_ONE_HOST, "prefill_context_parallel_size", so=(1,), short=("-pcp",)),
    *_values(_ONE_HOST, "nnodes", so=(1,)),
    *_values(_ONE_HOST, "node_rank", so=(0,)),
    *_values(_ONE_HOST, "master_addr", "master_port"),
    *_values("ranks are processes of this host", "distributed_executor_backend", so=("mp", "uni")),
    *_values(_COPIES, "data_parallel_size_local", so=(1,), short=("-dpl",)),
    *_values(_COPIES, "data_parallel_rank", "data_parallel_start_rank", so=(0,)),
    *_values(_COPIES, "data_parallel_address", "data_parallel_rpc_port", "data_parallel_backend"),
    *_flags(_COPIES, "data_parallel_hybrid_lb", "data_parallel_external_lb"),
    *_flags(_COPIES, "headless", face="server"),
    *_values("use --api-processes", "api_server_count", so=(1,), face="server", short=("-asc",)),
    *_flags(_EXPERTS, "enable_eplb", "enable_dbo"),
    *_values(_EXPERTS, "all2all_backend", "expert_placement_strategy", "eplb_config"),
    *_values(_EXPERTS, "num_redundant_experts", so=(0,)),
    *_values(_KINDS, "task", so=("auto", "generate")),
    *_values(_KINDS, "convert", so=("auto", "none")),
    *_values(_TEXT, "limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", so=({},)),
    *_values(_TEXT, "allowed_local_media_path", so=("",)),
    *_values(_POOLING, "pooler_config", "override_pooler_config"),
    *_values(_TEXT, "mm_processor_cache_gb"),
    *_flags(_TEXT, "interleave_mm_strings", "enable_prompt_embeds", "enable_mm_embeds"),
    *_flags(
        _TEXT, "language_model_only", "skip_mm_profiling", so=True, note="models are of text alone"
    ),
    *_values(_SWAP, "swap_space", so=(0,), note="nothing is swapped to the host's memory"),
    *_values(_SWAP, "cpu_offload_gb", so=(0,), note="nothing is offloaded to the host's memory"),
    *_values(_SWAP, "kv_offloading_size", so=(0,)),
    *_values(_SWAP, "kv_offloading_backend"),
    *_values(_SWAP, "preemption_mode", so=("recompute",), note="it is always recomputed"),
    *_values(_GRAPHS, "max_seq_len_to_capture", "max_cudagraph_capture_size", "compilation_config"),
    *_values(_GRAPHS, "cuda_graph_sizes", "cudagraph_capture_sizes", is_list=True),
    *_values(_GRAPHS, "optimization_level", short=("-O",)),
    *_flags(
        "prompts are always computed in chunks; a step's size is --max-num-batched-tokens",
        "enable_chunked_prefill",
        so=True,
        note="prompts are always computed in chunks",
    ),
    *_values(_STEPS, "max_num_partial_prefills", "max_long_partial_prefills", so=(1,)),
    *_values(_STEPS, "long_prefill_token_threshold", "scheduler_delay_factor", so=(0,)),
    *_values(_STEPS, "num_scheduler_steps", so=(1,)),
    *_values(
        "requests run in the order they came, within a priority",
        "scheduling_policy",
        so=("fcfs", "priority"),
        note="requests run in the order they came, within a priority",
    ),
    *_values("the scheduler is built in", "scheduler_cls", so=("auto",)),
    *_flags(
        "steps are always scheduled one ahead of the device",
        "async_scheduling",
        so=True,
    ),
    *_flags("blocks are always managed so", "use_v2_block_manager", so=True),
    *_flags("every layer has blocks of its kind", "disable_hybrid_kv_cache_manager"),
    *_flags("windows of a model are kept", "disable_sliding_window"),
    *_flags("shared prefixes are attended once; see --deterministic", "disable_cascade_attn"),
    *_values(
        "blocks are found by SHA-256",
        "prefix_caching_hash_algo",
        so=("sha256", "sha256_cbor", "sha256_cbor_64bit"),
        note="blocks are found by SHA-256",
    ),
    *_values("use --kv-cache-memory-bytes", "num_gpu_blocks_override"),
    *_flags("every vector of the KV cache has its own scale", "calculate_kv_scales"),
    *_flags("every layer has its own keys and values", "kv_sharing_fast_prefill"),
    *_flags(
        "ranks speak through NCCL",
        "disable_custom_all_reduce",
        so=True,
        note="ranks speak through NCCL alone",
    ),
    VllmOption(
        name="trust_remote_code",
        reason=_CODE,
        is_flag=True,
        neutral=(True, False),
        note="a model's own code is never run",
    ),
    *_values(_CODE, "model_impl", so=("auto", "vllm")),
    *_values(_CODE, "worker_cls", so=("auto",)),
    *_values(_CODE, "worker_extension_cls", so=("",)),
    *_values(_CODE, "logits_processors", so=([],), is_list=True),
    *_values(_MODEL_FILES, "config_format", so=("auto", "hf")),
    *_values(_MODEL_FILES, "tokenizer_mode", so=("auto", "hf")),
    *_values(_MODEL_FILES, "hf_overrides", "model_loader_extra_config", so=({},)),
    *_values(_MODEL_FILES, "additional_config", "rope_scaling", so=({},)),
    *_values(_MODEL_FILES, "rope_theta", "hf_config_path", "code_revision", "tokenizer_revision"),
    *_values(_MODEL_FILES, "ignore_patterns", is_list=True),
    *_values(_MODEL_FILES, "safetensors_load_strategy", so=("lazy",)),
    *_flags(_MODEL_FILES, "use_tqdm_on_load", so=True),
    *_values("set HF_TOKEN in the environment", "hf_token"),
    *_values("tokenising needs no pool", "tokenizer_pool_size", so=(0,)),
    *_values("give defaults of sampling with each request", "override_generation_config", so=({},)),
    *_values("the limit is 100 tokens a position", "max_logprobs", so=(100,)),
    *_flags("a running engine is not put to sleep", "enable_sleep_mode"),
    *_values(_TRACES, "collect_detailed_traces", "profiler_config"),
    *_values("metrics have one version", "show_hidden_metrics_for_version"),
    *_values(
        "KV is not moved between engines; an OffloadingConnector is taken, but has no effect",
        "kv_transfer_config",
    ),
    *_values("use --log-level", "uvicorn_log_level", face="server"),
    *_flags(_LOGS, "enable_log_requests", "enable_log_outputs", face="server"),
    *_flags(_LOGS, "disable_log_requests", so=True, face="server"),
    *_values(_LOGS, "max_log_len", face="server"),
    *_flags(
        "use --log-level warning, which leaves access lines out",
        "disable_uvicorn_access_log",
        face="server",
    ),
    *_flags(_CORS, "allow_credentials", face="server"),
    *_values(_CORS, "allowed_methods", "allowed_headers", so=(["*"],), face="server"),
    *_values("put a proxy in front", "middleware", face="server"),
    *_values("listen on --host and --port", "uds", face="server"),
    *_flags(
        "the engine always has its own process", "disable_frontend_multiprocessing", face="server"
    ),
    *_values("clients' certificates are a proxy's to ask for", "ssl_ca_certs", face="server"),
    *_values(
        "clients' certificates are a proxy's to ask for", "ssl_cert_reqs", so=(0,), face="server"
    ),
    *_values("TLS takes what Python's default takes", "ssl_ciphers", face="server"),
    *_flags(
        "every answer has its X-Request-Id",
        "enable_request_id_headers",
        so=True,
        face="server",
    ),
    *_flags(
        "cached tokens are always told",
        "enable_prompt_tokens_details",
        so=True,
        face="server",
    ),
    *_flags(
        "clients ask for it: stream_options.include_usage",
        "enable_force_include_usage",
        face="server",
    ),
    *_flags("GET /metrics has the load", "enable_server_load_tracking", face="server"),
    *_flags(
        "clients ask for it: return_tokens_as_token_ids",
        "return_tokens_as_token_ids",
        face="server",
    ),
    *_flags("use --chat-template", "trust_request_chat_template", face="server"),
    *_flags("POST /tokenize is all there is", "enable_tokenizer_info_endpoint", face="server"),
    *_flags("keys guard it", "disable_fastapi_docs", face="server"),
    *_values("the role is assistant", "response_role", so=("assistant",), face="server"),
    *_values(
        "templates get the text of a message",
        "chat_template_content_format",
        so=("auto", "string"),
        face="server",
    ),
    *_values("write the options on the command line", "config", face="server"),
]

VLLM_OPTIONS: dict[str, VllmOption] = {option.name: option for option in _TABLE}
"""By name."""
