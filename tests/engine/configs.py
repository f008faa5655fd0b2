"""What the engines of the tests are configured to be."""

from __future__ import annotations

from typing import Any

from octavo import EngineConfig

PROMPT = list(range(40))


def config(model: str, **more: object) -> EngineConfig:
    return EngineConfig(
        model=model,
        device="cpu",
        skip_tokenizer_init=True,
        poison_freed_blocks=True,
        num_threads=1,
        kv_cache_memory_bytes=2**22,
        **more,  # type: ignore[arg-type]
    )


OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "poison_freed_blocks": True,
    "device": "cpu",
    "attention_backend": "reference",
    "num_threads": 1,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_model_len": 128,
}
