"""What a GGUF file of architecture `deepseek2` says of attention. No torch.

Asked by `gguf_config`. Keys that contradict each other, or the tensors that sizes come from, are
refused by name.
"""

from __future__ import annotations

from typing import Any

from octavo.weights.gguf_grouped import as_written
from octavo.weights.gguf_reader import Reader

_QUERY_LATENTS = "blk.0.attn_q_a.weight"


def latent_attention_config(reader: Reader) -> dict[str, Any]:
    """Returns the keys of attention.

    Files of newer converters describe attention as it is computed, with one key and value head for
    all: a head's own sizes are then in keys that end with `_mla`.
    """
    num_heads, rank = reader.size("attention.head_count"), reader.size("attention.kv_lora_rank")
    rope_size = reader.size("rope.dimension_count")
    if reader.integer("attention.head_count_kv", num_heads) not in (1, num_heads):
        raise reader.refuse("attention.head_count_kv", f"1 or the number of heads, {num_heads}")
    end = ""
    if reader.value("attention.key_length_mla") is not None:
        end = "_mla"
        reader.check_implied(
            "attention.key_length", rank + rope_size, "kv_lora_rank + dimension_count"
        )
        reader.check_implied("attention.value_length", rank, "kv_lora_rank")
    head_size = reader.size(f"attention.key_length{end}")
    if head_size <= rope_size:
        more = f"more than rope.dimension_count, {rope_size}"
        raise reader.refuse(f"attention.key_length{end}", more)
    return {
        "num_key_value_heads": num_heads,
        "head_dim": rope_size,
        "kv_lora_rank": rank,
        "q_lora_rank": _query_rank(reader),
        "qk_nope_head_dim": head_size - rope_size,
        "qk_rope_head_dim": rope_size,
        "v_head_dim": reader.size(f"attention.value_length{end}"),
        "rope_interleave": True,  # no converter reorders the rows
    }


def yarn_sharpness(reader: Reader) -> dict[str, float]:
    """Returns the two fields of YaRN that the file has as one, times 0.1: they are equal in it."""
    sharpness = 10 * reader.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not sharpness:
        return {}
    return dict.fromkeys(("mscale", "mscale_all_dim"), as_written(sharpness))


def _query_rank(reader: Reader) -> int | None:
    """Returns the size of the queries' latent vectors, which must be that of their tensor."""
    rank = reader.integer("attention.q_lora_rank", 0)
    rows = 0
    if _QUERY_LATENTS in reader.file.tensors:
        rows = reader.shape(_QUERY_LATENTS)[0]
    if rank != rows:
        tensor = f"the rows of {_QUERY_LATENTS}" if rows else f"as there is no {_QUERY_LATENTS}"
        raise reader.refuse("attention.q_lora_rank", f"{rows}, {tensor}")
    return rank or None
