"""How a plan is shown: as text, or as JSON.

Called by `octavo plan`. Never plans.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.cli.plan.planner import Layout
    from octavo.config import EngineConfig
    from octavo.kv_cache.planner import MemoryPlan
    from octavo.models.spec import ModelSpec


def device_text(device: str, size: int | None) -> str:
    """Says which device is planned for, and how to plan for another."""
    here = "this machine's" if size is None else f"one with {_size(size)} of memory"
    other = "" if device != "cpu" else f"; --device cuda --memory {_other_size(size)} plans a GPU"
    return f"device: {device}, {here}{other}"


def products_text(config: EngineConfig) -> str:
    """Says what a CPU multiplies packed weights with, and how to ask for the other."""
    if config.activation_dtype == "int8":
        return "products: packed weights with activations in int8, all others in float32"
    return "products: activations in float32; --activation-dtype int8 is faster with packed weights"


def _other_size(size: int | None) -> str:
    return "80GiB" if size is None else f"{size / 2**30:g}GiB"


def _size(size: int) -> str:
    from octavo.kv_cache.plan_text import gib

    return gib(size) if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def parts_text(model: str, spec: ModelSpec, parts: dict[str, int]) -> str:
    head = (
        f"{model}: {spec.num_parameters / 1e6:,.1f} M parameters, {len(spec.layers)} layers, "
        f"{spec.max_position_embeddings:,} positions"
    )
    if spec.moe_layers:
        head += f", {len(spec.moe_layers)} with up to {spec.max_experts} experts"
    rows = [f"  {name:<16}{_size(size):>12}" for name, size in parts.items() if size]
    return "\n".join([head, "weights:", *rows, f"  {'all':<16}{_size(sum(parts.values())):>12}"])


def plan_text(plan: MemoryPlan, lengths: tuple[int, ...]) -> str:
    from octavo.kv_cache.plan_text import describe, describe_groups

    lines = [describe(plan), describe_groups(plan)]
    fitting = [n for n in lengths if n <= plan.max_model_len]
    if fitting:
        limit = f"--max-num-seqs {plan.max_num_seqs:,} lets no more run"
        lines.append(f"requests that run side by side, sharing nothing ({limit}):")
        lines += [f"  {n:>9,} tokens  {plan.num_requests(n):>9,}" for n in fitting]
    return "\n".join(lines)


def layout_text(layout: Layout, config: EngineConfig) -> str:
    """Says how ranks should share the experts."""
    if layout == "parts":
        count = config.tensor_parallel_size
        return f"layout: a part of each expert on every rank; {count} ranks cannot share whole ones"
    how = "as asked" if config.enable_expert_parallel else "add --enable-expert-parallel"
    return f"layout: whole experts are quicker than a part of each on every rank: {how}"


def changes_text(changes: Mapping[str, MemoryPlan | str]) -> str:
    head = f"  {'with':<40}{'weights':>11}{'activations':>12}{'KV cache':>11}"
    lines = ["what would change:", f"{head}{'KiB/token':>11}{'tokens':>11}{'context':>10}"]
    for option, plan in changes.items():
        if isinstance(plan, str):
            lines.append(f"  {option:<40} does not fit")
            continue
        sizes = (plan.weights_bytes, plan.activation_bytes, plan.kv_bytes)
        lines.append(
            f"  {option:<40}{_size(sizes[0]):>11}{_size(sizes[1]):>12}{_size(sizes[2]):>11}"
            f"{plan.kv_token_bytes / 1024:>11.1f}{plan.num_tokens:>11,}{plan.max_model_len:>10,}"
        )
    return "\n".join(lines)


def as_json(
    spec: ModelSpec,
    parts: dict[str, int],
    plan: MemoryPlan,
    changes: Mapping[str, MemoryPlan | str],
    lengths: tuple[int, ...],
    layout: Layout | None,
) -> dict[str, Any]:
    return {
        "num_parameters": spec.num_parameters,
        "weights_parts_bytes": parts,
        **_numbers(plan),
        "experts_layout": layout,
        "groups": [
            {
                "layers": list(group.layers),
                "sees": str(group.spec.visibility),
                "formats": group.spec.formats,
                "page_bytes": group.page_bytes(plan.block_size),
            }
            for group in plan.groups
        ],
        "num_requests": {str(n): plan.num_requests(n) for n in lengths if n <= plan.max_model_len},
        "changes": {
            option: other if isinstance(other, str) else _numbers(other)
            for option, other in changes.items()
        },
    }


def _numbers(plan: MemoryPlan) -> dict[str, int]:
    names = (
        "available_bytes",
        "usable_bytes",
        "weights_bytes",
        "activation_bytes",
        "graph_bytes",
        "other_bytes",
        "kv_bytes",
        "kv_token_bytes",
        "block_bytes",
        "num_blocks",
        "num_tokens",
        "max_model_len",
        "max_num_batched_tokens",
    )
    return {name: getattr(plan, name) for name in names}
