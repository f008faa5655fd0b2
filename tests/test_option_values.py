"""Options as Python values: read as the command line reads its texts, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError


@pytest.mark.parametrize(
    ("field", "given", "read"),
    [
        ("kv_cache_memory_bytes", "2GiB", 2**31),
        ("kv_cache_memory_bytes", 2**31, 2**31),
        ("kv_cache_memory_bytes", np.int64(4096), 4096),
        ("max_model_len", "4K", 4096),
        ("max_model_len", "auto", None),
        ("max_model_len", -1, None),
        ("max_model_len", 77, 77),
        ("max_num_batched_tokens", "8k", 8000),
        ("dtype", "half", "float16"),
        ("gpu_memory_utilization", 1, 1.0),
        ("gpu_memory_utilization", np.float32(0.5), 0.5),
        ("chat_template", Path("a.jinja"), "a.jinja"),
        ("chat_template", None, None),
    ],
)
def test_values_of_the_engine_are_read(field: str, given: Any, read: Any):
    value = getattr(EngineConfig(model="m", **{field: given}).resolve(), field)
    assert value == read
    assert type(value) is type(read)


def test_a_dtype_of_torch_is_known():
    torch = pytest.importorskip("torch")
    assert EngineConfig(model="m", dtype=torch.bfloat16).resolve().dtype == "bfloat16"


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("kv_cache_memory_bytes", "2GX"),
        ("kv_cache_memory_bytes", 1.5),
        ("kv_cache_memory_bytes", -1),
        ("max_model_len", "4x"),
        ("max_model_len", True),
        ("max_model_len", 0),
        ("max_num_seqs", "16"),
        ("max_num_seqs", 1.5),
        ("max_num_seqs", [4]),
        ("gpu_memory_utilization", "0.9"),
        ("gpu_memory_utilization", float("nan")),
        ("gpu_memory_utilization", True),
        ("enforce_eager", "yes"),
        ("enforce_eager", 1),
        ("tokenizer", 5),
        ("dtype", "bf16"),
        ("dtype", ["float32"]),
        ("block_size", "16.0"),
        ("seed", 1.0),
        ("model", ""),
        ("model", 5),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(field: str, given: Any):
    with pytest.raises(ConfigError, match=field) as refused:
        EngineConfig(**{"model": "m", field: given}).resolve()
    assert refused.value.field == field


def test_one_name_is_a_list_of_one():
    one: Any = "chat"
    assert ServerConfig(served_model_name=one).resolve().served_model_name == ("chat",)
    wrong: Any = (1, 2)
    with pytest.raises(ConfigError, match="api_key must be a list of texts"):
        ServerConfig(api_key=wrong).resolve()


def test_a_key_or_a_refresh_needs_a_certificate():
    with pytest.raises(ConfigError, match="ssl_keyfile needs ssl_certfile"):
        ServerConfig(ssl_keyfile="k").resolve()
    with pytest.raises(ConfigError, match="enable_ssl_refresh needs ssl_certfile"):
        ServerConfig(enable_ssl_refresh=True).resolve()
