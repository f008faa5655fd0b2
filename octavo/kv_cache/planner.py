"""The memory plan: what weights, activations and KV cache get, and what fits into it. No torch.

Called by `octavo plan` (from a config alone) and by the engine at start-up, which holds itself to
the result. Never allocates anything; the arithmetic of pages is `spec.group_layers`.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.errors import CapacityError
from octavo.kv_cache.spec import KVGroup, KVSpec, group_layers

GIB = 2**30
MAX_DEFAULT_KV_BYTES = 4 * GIB
"""What the KV cache takes of a CPU's memory if nobody says more: the machine does other work."""
DEFAULT_BATCHED_TOKENS = 512
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
class MemoryPlan:
    """What goes where, in bytes, and what fits. Made by `plan_memory`."""

    available_bytes: int
    """Memory of the device that was free when the plan was made."""
    usable_bytes: int
    """The share of it that `gpu_memory_utilization` allows."""
    weights_bytes: int
    activation_bytes: int
    groups: tuple[KVGroup, ...]
    block_size: int
    block_bytes: int
    """Of one page; all groups have equal pages."""
    num_blocks: int
    max_model_len: int
    max_num_batched_tokens: int
    max_position_embeddings: int

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
        return self.weights_bytes + self.activation_bytes + self.kv_bytes

    def num_requests(self, length: int) -> int:
        """Sequences of `length` tokens that fit side by side when nothing is shared."""
        needed = blocks_of_sequence(self.groups, length, self.block_size, 1)
        return (self.num_blocks - RESERVED_BLOCKS) // needed

    def describe(self) -> str:
        """Returns the plan as a readable table of several lines."""
        formats = ", ".join(dict.fromkeys(group.spec.format.name for group in self.groups))
        lengths = dict.fromkeys(n for n in (self.max_model_len, 1024) if n <= self.max_model_len)
        fits = ", ".join(f"{self.num_requests(n):,} of {n:,} tokens" for n in lengths)
        whole = " (the model's)" if self.max_model_len == self.max_position_embeddings else ""
        rows = (
            ("weights", self.weights_bytes, ""),
            ("activations", self.activation_bytes, f"{self.max_num_batched_tokens:,} tokens/step"),
            (
                "KV cache",
                self.kv_bytes,
                f"{self.num_blocks:,} blocks of {self.block_size} tokens, "
                f"{self.kv_token_bytes / 1024:.1f} KiB/token, {formats}",
            ),
            ("left", self.usable_bytes - self.total_bytes, ""),
        )
        head = f"memory plan: {gib(self.usable_bytes)} of {gib(self.available_bytes)} free memory"
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
    activations: ActivationShape,
    config: EngineConfig,
    max_position_embeddings: int,
    available_bytes: int,
) -> MemoryPlan:
    """Returns the plan of a model with one KVSpec per layer.

    The KV cache gets `kv_cache_memory_bytes` if given; else what is left, at most 4 GiB (or one
    sequence of a given `max_model_len`) and at most what `max_num_seqs` sequences can fill.
    Raises CapacityError saying what is missing and what would fit.
    """
    groups = group_layers(specs)
    size = config.block_size
    page = groups[0].page_bytes(size)
    wanted_len = config.max_model_len
    full_len = max_position_embeddings if wanted_len is None else wanted_len
    chunk = max(config.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS, size)
    activation = activations.step_bytes(chunk, min(chunk, config.max_num_seqs))
    usable = int(available_bytes * config.gpu_memory_utilization)
    room = usable - weights_bytes - activation
    least = (RESERVED_BLOCKS + blocks_of_sequence(groups, 1, size, 1)) * page
    if room < least:
        raise _too_large(weights_bytes, least + activation, config, available_bytes)
    one = (RESERVED_BLOCKS + blocks_of_sequence(groups, full_len, size, chunk)) * page
    if config.kv_cache_memory_bytes is not None:
        kv_bytes = config.kv_cache_memory_bytes
        _check_absolute(kv_bytes, room, least)
    else:
        cap = MAX_DEFAULT_KV_BYTES if wanted_len is None else max(MAX_DEFAULT_KV_BYTES, one)
        kv_bytes = min(room, cap, one * config.max_num_seqs)
    fitted = longest_sequence(groups, kv_bytes // page, full_len, size, chunk)
    if wanted_len is not None and fitted < wanted_len:
        raise _context_too_long(wanted_len, fitted, one, kv_bytes, groups)
    return MemoryPlan(
        available_bytes=available_bytes,
        usable_bytes=usable,
        weights_bytes=weights_bytes,
        activation_bytes=activation,
        groups=groups,
        block_size=size,
        block_bytes=page,
        num_blocks=kv_bytes // page,
        max_model_len=fitted,
        max_num_batched_tokens=chunk,
        max_position_embeddings=max_position_embeddings,
    )


def blocks_of_sequence(
    groups: tuple[KVGroup, ...], length: int, block_size: int, chunk: int
) -> int:
    """Returns the most blocks that a sequence of `length` tokens holds at once.

    A window's group keeps the window before the first query, the chunk of up to `chunk` tokens
    being computed, and what of the first block lies before the window.
    """
    blocks = 0
    for group in groups:
        window = group.spec.window
        seen = length if window is None else min(length, window + chunk + block_size)
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


def available_memory() -> int:
    """Returns the bytes of memory that the device has free now."""
    return select_device("auto").memory().available_bytes


def gib(size: int) -> str:
    """Returns a number of bytes as text in GiB."""
    return f"{size / GIB:.2f} GiB"


def _too_large(
    weights_bytes: int, beside: int, config: EngineConfig, available_bytes: int
) -> CapacityError:
    usable = int(available_bytes * config.gpu_memory_utilization)
    needed = weights_bytes + beside
    return CapacityError(
        f"the model does not fit: it needs {gib(needed)} (weights {gib(weights_bytes)}, "
        f"activations and the smallest KV cache {gib(beside)}), {gib(usable)} may be used "
        f"({gib(available_bytes)} free x gpu_memory_utilization "
        f"{config.gpu_memory_utilization:g}), {gib(needed - usable)} are missing. What would fit: "
        f"weights of up to {gib(max(usable - beside, 0))} (a smaller model, or a GGUF file in "
        f"q8_0 or q4_k), or {gib(int(needed / config.gpu_memory_utilization))} of free memory",
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
    wanted: int, fitted: int, needed: int, there: int, groups: tuple[KVGroup, ...]
) -> CapacityError:
    ways = [f"max_model_len {fitted}"]
    if any(group.spec.format.element_bytes > 2 for group in groups):
        half = needed // 2
        verdict = "fits" if half <= there else "is still too much"
        ways.append(f"kv_cache_dtype float16 (needs {gib(half)}, {verdict})")
    ways.append("more memory, or a larger gpu_memory_utilization or kv_cache_memory_bytes")
    return CapacityError(
        f"max_model_len {wanted} needs {gib(needed)} of KV cache for one request, {gib(there)} "
        f"are there. What would fit: {'; '.join(ways)}",
        field="max_model_len",
    )
