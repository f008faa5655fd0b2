"""The memory plan in words: what is where, what fits, and what would if it does not. No torch.

Called by the planner, the command line and the server's start. Arithmetic is the planner's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.errors import CapacityError
from octavo.formats import KV_FORMATS
from octavo.kv_cache.spec import KVSpec

if TYPE_CHECKING:
    from octavo.kv_cache.planner import Budget, MemoryPlan

GIB = 2**30
_ADVISED = ("int8", "float16")
"""Formats of keys and values that take less, for those who are short of memory."""


def describe(plan: MemoryPlan) -> str:
    """Returns the plan as a readable table of several lines."""
    formats = ", ".join(dict.fromkeys(group.spec.formats for group in plan.groups))
    lengths = dict.fromkeys(n for n in (plan.max_model_len, 1024) if n <= plan.max_model_len)
    fits = ", ".join(f"{plan.num_requests(n):,} of {n:,} tokens" for n in lengths)
    whole = " (the model's)" if plan.max_model_len == plan.max_position_embeddings else ""
    graphs = [("graphs", plan.graph_bytes, "")] if plan.graph_bytes else []
    note = "on a CPU the KV cache takes 4 GiB unless --kv-cache-memory says otherwise"
    note = note if plan.is_default_kv else ""
    rest = [("left", plan.usable_bytes - plan.total_bytes, note)]
    if plan.other_bytes:
        rest = [
            ("others", plan.other_bytes, "in use by others on the GPU"),
            ("free", plan.available_bytes - plan.total_bytes, ""),
        ]
    rows = (
        ("weights", plan.weights_bytes, ""),
        ("activations", plan.activation_bytes, f"{plan.max_num_batched_tokens:,} tokens/step"),
        *graphs,
        (
            "KV cache",
            plan.kv_bytes,
            f"{_pages(plan)}, {plan.kv_token_bytes / 1024:.1f} KiB/token, {formats}",
        ),
        *rest,
    )
    each = f" of each of {plan.num_devices} devices" if plan.num_devices > 1 else ""
    each += f" of each of {plan.num_engines} engines" if plan.num_engines > 1 else ""
    sizes = f"{gib(plan.usable_bytes)} of {gib(plan.available_bytes)} free memory"
    head = f"memory plan{each}: {sizes}"
    body = [f"  {name:<12}{gib(size):>12}  {note}".rstrip() for name, size, note in rows]
    tail = [
        f"  {'context':<12}{plan.max_model_len:>12,}  tokens{whole}",
        f"  {'fits':<12}{plan.num_tokens:>12,}  tokens; requests at once: {fits}",
    ]
    return "\n".join([head, *body, *tail])


def describe_groups(plan: MemoryPlan) -> str:
    """Returns what each KV group keeps, and of what, in several lines."""
    lines = ["KV groups:"]
    for group in plan.groups:
        size = group.page_bytes(plan.block_size)
        share = f"{size / plan.block_size / 1024:.1f} KiB/token"
        if group.is_state:
            share = f"{size / 1024:.1f} KiB/sequence"
        layers = f"{len(group.layers)} layers that see {group.spec.visibility}"
        lines.append(f"  {layers}: {share}, {group.spec.formats}")
    return "\n".join(lines)


def _pages(plan: MemoryPlan) -> str:
    """What the KV cache consists of."""
    if len(plan.layout.classes) == 1:
        return f"{plan.num_chunks:,} blocks of {plan.block_size} tokens"
    states = f", {plan.state_bytes / 2**20:.1f} MiB/sequence of states" if plan.state_bytes else ""
    size = plan.layout.chunk_bytes / 2**20
    return f"{plan.num_chunks:,} chunks of {size:.2f} MiB for pages of several sizes{states}"


def gib(size: int) -> str:
    """Returns a number of bytes as text in GiB."""
    return f"{size / GIB:.2f} GiB"


def too_large(
    weights_bytes: int, beside: int, config: EngineConfig, budget: Budget
) -> CapacityError:
    usable, needed = budget.usable_bytes, weights_bytes + beside
    memory = int((needed + budget.other_bytes) / config.gpu_memory_utilization)
    return CapacityError(
        f"the model does not fit: it needs {gib(needed)} (weights {gib(weights_bytes)}, "
        f"activations and the smallest KV cache {gib(beside)}), {gib(usable)} may be used "
        f"({budget.formula}), {gib(needed - usable)} are missing. What would fit: "
        f"weights of up to {gib(max(usable - beside, 0))} ({budget.smaller_weights}), or "
        f"{gib(memory)} of {budget.memory_name}",
        field="model",
    )


def check_absolute(kv_bytes: int, room: int, least: int) -> None:
    if kv_bytes > room:
        raise CapacityError(
            f"kv_cache_memory_bytes is {kv_bytes} ({gib(kv_bytes)}), but {gib(room)} are left "
            f"beside weights and activations; use at most {room}, or leave the option out",
            field="kv_cache_memory_bytes",
        )
    if kv_bytes < least:
        raise CapacityError(
            f"kv_cache_memory_bytes is {kv_bytes}, but the smallest KV cache of this model takes "
            f"{least} bytes; use at least that, or leave the option out",
            field="kv_cache_memory_bytes",
        )


def context_too_long(
    wanted: int,
    fitted: int,
    needed: int,
    there: int,
    specs: tuple[KVSpec, ...],
    budget: Budget,
) -> CapacityError:
    ways = [f"max_model_len {fitted}"]
    plane = specs[0].planes[0]
    size, stored = plane.shape[-1], KV_FORMATS[plane.number]
    for name in _ADVISED:
        bits = KV_FORMATS[name].vector_bits(size)
        if bits < stored.vector_bits(size):
            smaller = needed * bits // stored.vector_bits(size)
            verdict = "fits" if smaller <= there else "is still too much"
            ways.append(f"kv_cache_dtype {name} (needs {gib(smaller)}, {verdict})")
    ways.append("smaller weights, or a larger gpu_memory_utilization or kv_cache_memory_bytes")
    return CapacityError(
        f"max_model_len {wanted} needs {gib(needed)} of KV cache for one request, {gib(there)} "
        f"are there, {gib(needed - there)} are missing ({gib(budget.usable_bytes)} may be used: "
        f"{budget.formula}). What would fit: {'; '.join(ways)}",
        field="max_model_len",
    )
