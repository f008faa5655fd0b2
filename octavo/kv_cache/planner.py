"""The memory plan: what weights, activations and KV cache get, and what fits into it. No torch.

Called through `engine.memory` by `octavo plan` (from a config alone) and by the engine at start-up,
which holds itself to the result. Never allocates anything; the arithmetic of pages is
`spec.group_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.device import DeviceMemory
from octavo.errors import CapacityError
from octavo.formats import KV_FORMATS
from octavo.kernels.facts import split_slots
from octavo.kv_cache.spec import KVGroup, KVSpec, group_layers

GIB = 2**30
MAX_DEFAULT_KV_BYTES = 4 * GIB
"""What the KV cache takes of a CPU's memory if nobody says more: the machine does other work."""
RESERVED_BLOCKS = 1
"""Block 0 stands in the columns that no layer can see and is never handed out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationShape:
    """Widths of a model's largest intermediate results, in float32 elements of one token."""

    hidden_size: int
    qkv_size: int
    """Columns of q, k and v side by side."""
    mlp_size: int
    """Gate and up columns that one token needs at once: of all its experts in a MoE layer."""
    vocab_size: int

    def step_bytes(self, num_tokens: int, num_samples: int) -> int:
        """Bytes live at the worst point of a step: residual, input, output, q, k, v and MLP of
        every token; logits, probabilities, sorted values and their order of every sample."""
        token = 4 * self.hidden_size + 2 * self.qkv_size + 2 * self.mlp_size
        return 4 * (num_tokens * token + num_samples * 5 * self.vocab_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a device gives to the engine, and the defaults that go with it."""

    available_bytes: int
    """Memory of the device that was free when the plan was made."""
    usable_bytes: int
    """The share of it that `gpu_memory_utilization` allows."""
    other_bytes: int = 0
    """Of a GPU, what others and our own driver context hold."""
    graph_bytes: int = 0
    max_default_kv_bytes: int | None = None
    default_batched_tokens: tuple[int, ...]
    """Largest first; the first that leaves room enough is taken, or the last."""
    formula: str
    """How `usable_bytes` came about."""
    memory_name: str
    """What the operator would have to get more of."""
    smaller_weights: str
    """Where weights that take less would come from."""


def host_budget(available_bytes: int, utilization: float) -> Budget:
    """Returns a CPU's: a share of what is free now, as the machine does other work."""
    return Budget(
        available_bytes=available_bytes,
        usable_bytes=int(available_bytes * utilization),
        max_default_kv_bytes=MAX_DEFAULT_KV_BYTES,
        default_batched_tokens=(512,),
        formula=f"{gib(available_bytes)} free x gpu_memory_utilization {utilization:g}",
        memory_name="free memory",
        smaller_weights="a smaller model, or a GGUF file in q8_0 or q4_k",
    )


def gpu_budget(memory: DeviceMemory, utilization: float, graph_bytes: int) -> Budget:
    """Returns a GPU's: a share of the whole card, less what is in use now."""
    other = memory.total_bytes - memory.available_bytes
    return Budget(
        available_bytes=memory.available_bytes,
        usable_bytes=max(int(memory.total_bytes * utilization) - other, 0),
        other_bytes=other,
        graph_bytes=graph_bytes,
        default_batched_tokens=(8192, 4096, 2048, 1024),
        formula=(
            f"{gib(memory.total_bytes)} x gpu_memory_utilization {utilization:g} less {gib(other)} "
            "in use by others"
        ),
        memory_name="GPU memory",
        smaller_weights="a smaller model",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What goes where, in bytes, and what fits. Made by `plan_memory`."""

    available_bytes: int
    """Memory of the device that was free when the plan was made."""
    usable_bytes: int
    """The share of it that `gpu_memory_utilization` allows."""
    other_bytes: int = 0
    """Of a GPU, what others and our own driver context held when the plan was made."""
    weights_bytes: int
    activation_bytes: int
    graph_bytes: int = 0
    groups: tuple[KVGroup, ...]
    block_size: int
    block_bytes: int
    """Of one page; all groups have equal pages."""
    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    max_position_embeddings: int
    max_num_seqs: int
    num_devices: int = 1
    """That share every layer; all sizes are those of each."""
    is_default_kv: bool = False
    """Whether the KV cache could be larger, but nobody asked for it."""

    @property
    def kv_token_bytes(self) -> int:
        """Bytes that one token takes in all groups together, padding included."""
        return len(self.groups) * self.block_bytes // self.block_size

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds at once."""
        return (self.num_blocks - RESERVED_BLOCKS) // len(self.groups) * self.block_size

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.graph_bytes + self.kv_bytes

    def num_requests(self, length: int) -> int:
        """Sequences of `length` tokens that run side by side when nothing is shared: as many as
        fit, and no more than `max_num_seqs`."""
        needed = blocks_of_sequence(self.groups, length, self.block_size, 1)
        return min((self.num_blocks - RESERVED_BLOCKS) // needed, self.max_num_seqs)

    def describe(self) -> str:
        """Returns the plan as a readable table of several lines."""
        formats = ", ".join(dict.fromkeys(group.spec.formats for group in self.groups))
        lengths = dict.fromkeys(n for n in (self.max_model_len, 1024) if n <= self.max_model_len)
        fits = ", ".join(f"{self.num_requests(n):,} of {n:,} tokens" for n in lengths)
        whole = " (the model's)" if self.max_model_len == self.max_position_embeddings else ""
        graphs = [("graphs", self.graph_bytes, "")] if self.graph_bytes else []
        note = "on a CPU the KV cache takes 4 GiB unless --kv-cache-memory says otherwise"
        note = note if self.is_default_kv else ""
        rest = [("left", self.usable_bytes - self.total_bytes, note)]
        if self.other_bytes:
            rest = [
                ("others", self.other_bytes, "in use by others on the GPU"),
                ("free", self.available_bytes - self.total_bytes, ""),
            ]
        rows = (
            ("weights", self.weights_bytes, ""),
            ("activations", self.activation_bytes, f"{self.max_num_batched_tokens:,} tokens/step"),
            *graphs,
            (
                "KV cache",
                self.kv_bytes,
                f"{self.num_blocks:,} blocks of {self.block_size} tokens, "
                f"{self.kv_token_bytes / 1024:.1f} KiB/token, {formats}",
            ),
            *rest,
        )
        each = f" of each of {self.num_devices} devices" if self.num_devices > 1 else ""
        sizes = f"{gib(self.usable_bytes)} of {gib(self.available_bytes)} free memory"
        head = f"memory plan{each}: {sizes}"
        body = [f"  {name:<12}{gib(size):>12}  {note}".rstrip() for name, size, note in rows]
        tail = [
            f"  {'context':<12}{self.max_model_len:>12,}  tokens{whole}",
            f"  {'fits':<12}{self.num_tokens:>12,}  tokens; requests at once: {fits}",
        ]
        return "\n".join([head, *body, *tail])


def plan_memory(
    specs: tuple[KVSpec, ...],
    *,
    weights_bytes: int,
    activation_bytes: Callable[[int], int],
    config: EngineConfig,
    max_position_embeddings: int,
    budget: Budget,
) -> MemoryPlan:
    """Returns the plan of a model with one KVSpec per layer.

    `activation_bytes` tells what a step of so many tokens takes. The KV cache gets
    `kv_cache_memory_bytes` if given; else what is left, at most the budget's default (or one
    sequence of a given `max_model_len`) and at most what `max_num_seqs` sequences can fill.
    Raises CapacityError saying what is missing and what would fit.
    """
    groups = group_layers(specs)
    size = config.block_size
    page = groups[0].page_bytes(size)
    wanted_len = config.max_model_len
    full_len = max_position_embeddings if wanted_len is None else wanted_len
    room = budget.usable_bytes - weights_bytes - budget.graph_bytes
    chunk = _batched_tokens(config, budget, activation_bytes, room)
    activation = activation_bytes(chunk)
    room -= activation
    least = (RESERVED_BLOCKS + blocks_of_sequence(groups, 1, size, 1)) * page
    if room < least:
        beside = activation + budget.graph_bytes + least
        raise _too_large(weights_bytes, beside, config, budget)
    one = (RESERVED_BLOCKS + blocks_of_sequence(groups, full_len, size, chunk)) * page
    if config.kv_cache_memory_bytes is not None:
        kv_bytes = config.kv_cache_memory_bytes
        _check_absolute(kv_bytes, room, least)
    else:
        cap = room if budget.max_default_kv_bytes is None else budget.max_default_kv_bytes
        kv_bytes = min(
            room, cap if wanted_len is None else max(cap, one), one * config.max_num_seqs
        )
    fitted = longest_sequence(groups, kv_bytes // page, full_len, size, chunk)
    if wanted_len is not None and fitted < wanted_len:
        raise _context_too_long(wanted_len, fitted, one, kv_bytes, groups, budget)
    return MemoryPlan(
        available_bytes=budget.available_bytes,
        usable_bytes=budget.usable_bytes,
        other_bytes=budget.other_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=activation,
        graph_bytes=budget.graph_bytes,
        groups=groups,
        block_size=size,
        block_bytes=page,
        num_blocks=kv_bytes // page,
        max_model_len=fitted,
        max_num_batched_tokens=chunk,
        max_position_embeddings=max_position_embeddings,
        max_num_seqs=config.max_num_seqs,
        num_devices=config.tensor_parallel_size,
        is_default_kv=config.kv_cache_memory_bytes is None
        and kv_bytes == budget.max_default_kv_bytes,
    )


def _batched_tokens(
    config: EngineConfig, budget: Budget, activation_bytes: Callable[[int], int], room: int
) -> int:
    """Returns the tokens of a step: as asked, but a block; else a default whose activations leave
    the KV cache three quarters of `room`."""
    if config.max_num_batched_tokens is not None:
        return max(config.max_num_batched_tokens, config.block_size)
    defaults = budget.default_batched_tokens
    return next((n for n in defaults if 4 * activation_bytes(n) <= room), defaults[-1])


def blocks_of_sequence(
    groups: tuple[KVGroup, ...], length: int, block_size: int, chunk: int
) -> int:
    """Returns the most blocks that a sequence of `length` tokens holds at once.

    A group of bounded visibility keeps what the first query sees, the chunk of up to `chunk` tokens
    being computed, and what of the first block lies before that.
    """
    blocks = 0
    for group in groups:
        most = group.spec.visibility.most_visible
        seen = length if most is None else min(length, most + chunk + block_size)
        blocks += -(-seen // block_size)
    return blocks


def longest_sequence(
    groups: tuple[KVGroup, ...], num_blocks: int, limit: int, block_size: int, chunk: int
) -> int:
    """Returns the largest length up to `limit` whose sequence fits `num_blocks` alone."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if RESERVED_BLOCKS + blocks_of_sequence(groups, middle, block_size, chunk) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def partial_bytes(num_rows: int, max_visible: int, num_heads: int, head_size: int) -> int:
    """Returns the most bytes of partial results that decoding rows have in the Triton back end.

    A row sees at most `max_visible` tokens; each is float32 [heads, head size] and a log-sum-exp
    a head.
    What the cache holds is no bound: rows that share blocks see more than that together.
    """
    return num_rows * split_slots(max_visible) * 4 * num_heads * (head_size + 1)


def gib(size: int) -> str:
    """Returns a number of bytes as text in GiB."""
    return f"{size / GIB:.2f} GiB"


def _too_large(
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


def _check_absolute(kv_bytes: int, room: int, least: int) -> None:
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


def _context_too_long(
    wanted: int,
    fitted: int,
    needed: int,
    there: int,
    groups: tuple[KVGroup, ...],
    budget: Budget,
) -> CapacityError:
    ways = [f"max_model_len {fitted}"]
    stored = groups[0].spec.planes[0].bits
    # One format of each size, the first that is listed.
    for bits, name in {f.bits: f.name for f in reversed(KV_FORMATS.values())}.items():
        if bits < stored:
            smaller = needed * bits // stored
            verdict = "fits" if smaller <= there else "is still too much"
            ways.append(f"kv_cache_dtype {name} (needs {gib(smaller)}, {verdict})")
    ways.append("smaller weights, or a larger gpu_memory_utilization or kv_cache_memory_bytes")
    return CapacityError(
        f"max_model_len {wanted} needs {gib(needed)} of KV cache for one request, {gib(there)} "
        f"are there, {gib(needed - there)} are missing ({gib(budget.usable_bytes)} may be used: "
        f"{budget.formula}). What would fit: {'; '.join(ways)}",
        field="max_model_len",
    )
