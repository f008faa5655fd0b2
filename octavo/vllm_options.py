"""Options by which vLLM's users know things: what is so here anyway, and what is not supported.

Called by the command line, LLM and AsyncLLM, which so accept and refuse the same ones in the same
words. Never sets anything: an option that changes what Octavo does is a field of config/.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError
from octavo.vllm_table import VLLM_OPTIONS

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What becomes of an option that was given."""

    text: str
    is_refused: bool = False
    is_warning: bool = False


def judge(name: str, value: Any, shown: str) -> Verdict | None:
    """Returns what becomes of vLLM's option `name`, None if it has none of this name.

    `shown` is the option as the user wrote it. Text is read as JSON where it is JSON, so that both
    faces mean the same by "0".
    """
    option = VLLM_OPTIONS.get(name)
    if option is None:
        return None
    plain = _plain(value)
    if plain is None:
        return Verdict(text="")
    shown = shown if len(shown) <= 90 else f"{shown[:87]}..."
    if name == "kv_transfer_config" and _connector(plain) == "OffloadingConnector":
        text = f"{shown}: KV is not offloaded, it stays on the device"
        return Verdict(text=text, is_warning=True)
    if any(plain == one and type(plain) is type(one) for one in option.neutral):
        return Verdict(text=f"{shown}: {option.note}" if option.note else "")
    return Verdict(text=f"{shown} is not supported: {option.reason}", is_refused=True)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that `name` is most likely a slip of, or None: no hint is better than
    a wrong one."""
    plain = name.lower().replace("_", "-")
    by_spelling = {one.lower().replace("_", "-"): one for one in known}
    synonym = SYNONYMS.get(plain.lstrip("-").replace("-", "_"), "").replace("_", "-")
    for spelling in (synonym, f"--{synonym}"):
        if spelling in by_spelling:
            return by_spelling[spelling]
    found = difflib.get_close_matches(plain, by_spelling, n=1, cutoff=0.86)
    return by_spelling[found[0]] if found else None


def read_options(model: str, options: Mapping[str, Any]) -> tuple[EngineConfig, list[Verdict]]:
    """Returns the config of an engine and what is to be said of vLLM's options among `options`.

    Raises ConfigError naming all that are unknown or not supported.
    """
    known = {field.name for field in fields(EngineConfig)} - {"model"}
    values: dict[str, Any] = {}
    refused: list[tuple[str, str]] = []
    said: list[Verdict] = []
    for name, value in options.items():
        if name in known:
            values[name] = value
        elif name in _SERVERS_ALONE:
            if value is not None:
                said.append(Verdict(text=f"{name}={value!r}: {_SERVERS_ALONE[name]}"))
        elif name in ALIASES:
            field, meanings = ALIASES[name]
            values[field] = next((means for one, means in meanings if one is value), value)
        elif (verdict := judge(name, value, f"{name}={value!r}")) is not None:
            if verdict.is_refused:
                refused.append((name, verdict.text))
            elif verdict.text:
                said.append(verdict)
        else:
            refused.append((name, _unknown(name, known | ALIASES.keys())))
    if refused:
        raise ConfigError("; ".join(text for _, text in refused), field=refused[0][0])
    return EngineConfig(model=model, **values).resolve(), said


def log_verdicts(verdicts: Iterable[Verdict]) -> None:
    """Writes to the log what is so anyway, and warns of what has no effect."""
    for verdict in verdicts:
        logger.log(logging.WARNING if verdict.is_warning else logging.INFO, "%s", verdict.text)


def _unknown(name: str, known: Iterable[str]) -> str:
    if name in {field.name for field in fields(ServerConfig)}:
        return f"{name} is an option of octavo serve"
    near = nearest(name, known)
    return f"there is no option {name!r}" + (f"; did you mean {near}?" if near else "")


def _plain(value: Any) -> Any:
    """Returns what text or number says: 0 of "0" and of 0.0, a mapping of its JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def _connector(config: Any) -> object:
    return config.get("kv_connector") if isinstance(config, Mapping) else None


ALIASES: Mapping[str, tuple[str, tuple[tuple[Any, str], ...]]] = {
    "enable_prefix_caching": (
        "prefix_caching",
        ((True, "on"), (False, "off"), (None, "auto")),
    ),
    "kv_cache_memory": ("kv_cache_memory_bytes", ()),
}
"""Other names of fields of EngineConfig, and what their values mean."""

_SERVERS_ALONE = {"disable_log_stats": "only octavo serve writes lines on throughput"}
"""Options of the server that vLLM's users give to an engine, too."""

SYNONYMS = {
    "tp": "tensor_parallel_size",
    "tp_size": "tensor_parallel_size",
    "dp": "data_parallel_size",
    "dp_size": "data_parallel_size",
    "num_replicas": "data_parallel_size",
    "context_length": "max_model_len",
    "ctx_size": "max_model_len",
    "max_context_len": "max_model_len",
    "mem_fraction_static": "gpu_memory_utilization",
    "threads": "num_threads",
    "cors": "allowed_origins",
    "cors_origins": "allowed_origins",
    "cors_allow_origins": "allowed_origins",
    "model_name": "served_model_name",
    "api_keys": "api_key",
    # TGI's
    "hostname": "host",
    "num_shard": "tensor_parallel_size",
    "sharded": "tensor_parallel_size",
    "max_total_tokens": "max_model_len",
    "max_input_tokens": "max_prompt_tokens",
    "max_input_length": "max_prompt_tokens",
    "max_batch_prefill_tokens": "max_num_batched_tokens",
    "max_batch_size": "max_num_seqs",
    "max_concurrent_requests": "max_num_queued_requests",
    "cuda_memory_fraction": "gpu_memory_utilization",
    "cors_allow_origin": "allowed_origins",
    "json_output": "log_format",
    "otlp_endpoint": "otlp_traces_endpoint",
    "prometheus_port": "metrics_port",
    "huggingface_hub_cache": "download_dir",
}
"""What other engines call an option, for hints."""
