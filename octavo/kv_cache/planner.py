"""The memory plan: what weights, activations and KV cache get, and what fits into it. No torch.

Called through `engine.memory` by `octavo plan` (from a config alone) and by the engine at start-up,
which holds itself to the result. Never allocates anything; the arithmetic of pages is that of
`spec` and `layout`, the words are `plan_text`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.device import DeviceMemory
from octavo.kv_cache.layout import ArenaLayout, arena_layout
from octavo.kv_cache.plan_text import GIB, check_absolute, context_too_long, gib, too_large
from octavo.kv_cache.spec import KVGroup, KVSpec, group_layers
from octavo.step import MAX_PADDED_TOKENS

MAX_DEFAULT_KV_BYTES = 4 * GIB
"""What the KV cache takes of a CPU's memory if nobody says more: the machine does other work."""


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
    max_padded_tokens: int = MAX_PADDED_TOKENS
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
    num_chunks: int
    """Of the arena (see `layout`): pages, where those of all groups have one size."""
    max_model_len: int
    max_num_batched_tokens: int
    max_position_embeddings: int
    max_num_seqs: int
    max_padded_tokens: int = MAX_PADDED_TOKENS
    """Of a step of few rows that is replayed as a graph."""
    num_devices: int = 1
    """That share every layer; all sizes are those of each."""
    num_engines: int = 1
    """That have as much each."""
    is_default_kv: bool = False
    """Whether the KV cache could be larger, but nobody asked for it."""

    @property
    def layout(self) -> ArenaLayout:
        return arena_layout(self.groups, self.block_size)

    @property
    def kv_token_bytes(self) -> int:
        """Bytes that one token takes in all groups together, padding included."""
        pages = (g.page_bytes(self.block_size) for g in self.groups if not g.is_state)
        return sum(pages) // self.block_size

    @property
    def state_bytes(self) -> int:
        """Bytes of a sequence's states."""
        return sum(g.page_bytes(self.block_size) for g in self.groups if g.is_state)

    @property
    def block_bytes(self) -> int:
        """Of a page of the first group."""
        return self.layout.classes[0].page_bytes

    @property
    def num_blocks(self) -> int:
        """Pages that there are if all are the first group's."""
        return self.num_chunks * self.layout.classes[0].pages_per_chunk

    @property
    def kv_bytes(self) -> int:
        return self.num_chunks * self.layout.chunk_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache holds at once, if every group keeps all of them."""
        layout, size = self.layout, self.block_size

        def fits(blocks: int) -> bool:
            pages = [group.num_columns(blocks * size, size) for group in self.groups]
            return layout.num_chunks(layout.need(pages)) <= self.num_chunks

        return largest(self.num_blocks, fits) * size

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.activation_bytes + self.graph_bytes + self.kv_bytes

    def num_requests(self, length: int) -> int:
        """Sequences of `length` tokens that run side by side when nothing is shared: as many as
        fit, and no more than `max_num_seqs`."""
        layout = self.layout
        pages = [group.most_pages(length, self.block_size, 1) for group in self.groups]
        one = layout.need(pages)
        return largest(self.max_num_seqs, lambda n: layout.num_chunks(n * one) <= self.num_chunks)


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
    page = arena_layout(groups, size).chunk_bytes
    wanted_len = config.max_model_len
    full_len = max_position_embeddings if wanted_len is None else wanted_len
    room = budget.usable_bytes - weights_bytes - budget.graph_bytes
    chunk = _batched_tokens(config, budget, activation_bytes, room)
    activation = activation_bytes(chunk)
    room -= activation
    least = chunks_of_sequence(groups, 1, size, 1) * page
    if room < least:
        beside = activation + budget.graph_bytes + least
        raise too_large(weights_bytes, beside, config, budget)
    one = chunks_of_sequence(groups, full_len, size, chunk) * page
    if config.kv_cache_memory_bytes is not None:
        kv_bytes = config.kv_cache_memory_bytes
        check_absolute(kv_bytes, room, least)
    else:
        cap = room if budget.max_default_kv_bytes is None else budget.max_default_kv_bytes
        kv_bytes = min(
            room, cap if wanted_len is None else max(cap, one), one * config.max_num_seqs
        )
    fitted = longest_sequence(groups, kv_bytes // page, full_len, size, chunk)
    if wanted_len is not None and fitted < wanted_len:
        raise context_too_long(wanted_len, fitted, one, kv_bytes, specs, budget)
    return MemoryPlan(
        available_bytes=budget.available_bytes,
        usable_bytes=budget.usable_bytes,
        other_bytes=budget.other_bytes,
        weights_bytes=weights_bytes,
        activation_bytes=activation,
        graph_bytes=budget.graph_bytes,
        groups=groups,
        block_size=size,
        num_chunks=kv_bytes // page,
        max_model_len=fitted,
        max_num_batched_tokens=chunk,
        max_position_embeddings=max_position_embeddings,
        max_num_seqs=config.max_num_seqs,
        max_padded_tokens=budget.max_padded_tokens,
        num_devices=config.tensor_parallel_size,
        num_engines=config.data_parallel_size,
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


def chunks_of_sequence(
    groups: tuple[KVGroup, ...], length: int, block_size: int, step_tokens: int
) -> int:
    """Returns the chunks of an arena that is just large enough for a sequence of `length` tokens,
    the null page included."""
    layout = arena_layout(groups, block_size)
    pages = [group.most_pages(length, block_size, step_tokens) for group in groups]
    return layout.num_chunks(layout.need(pages))


def longest_sequence(
    groups: tuple[KVGroup, ...], num_chunks: int, limit: int, block_size: int, step_tokens: int
) -> int:
    """Returns the largest length up to `limit` whose sequence fits `num_chunks` alone."""
    return largest(
        limit,
        lambda length: chunks_of_sequence(groups, length, block_size, step_tokens) <= num_chunks,
    )


def largest(limit: int, fits: Callable[[int], bool]) -> int:
    """Returns the largest number up to `limit` that fits, 0 if none does; what is smaller than one
    that fits must fit."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
