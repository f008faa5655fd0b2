"""From a model's spec to its memory plan: which KV format, how wide the activations are. No torch.

Called by the engine at start-up and by `octavo plan`, so that both say the same. The arithmetic of
the plan is `kv_cache.planner`; what a step takes in the Triton back end is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from octavo.config import EngineConfig
from octavo.device import Device, DeviceMemory
from octavo.errors import CapacityError, ConfigError
from octavo.formats import KVFormats, kv_formats
from octavo.kernels.facts import (
    DETERMINISTIC_TOKENS,
    PEER_BYTES,
    SHORT_SPLITS,
    UNPACKED_BYTES,
    UNPACKED_PARTS,
    UNPACKED_TOKENS,
    split_partials,
    unpacks_experts,
)
from octavo.kernels.limits import check_activations, check_backend, check_kv_formats
from octavo.kv_cache.planner import (
    ActivationShape,
    Budget,
    MemoryPlan,
    gib,
    gpu_budget,
    host_budget,
    plan_memory,
)
from octavo.kv_cache.spec import group_layers
from octavo.models.spec import LayerSpec, MLPSpec, ModelSpec, MoESpec
from octavo.step import MAX_PADDED_PROMPT_TOKENS, MAX_PADDED_TOKENS

MIB = 2**20
GRAPH_CAPTURES, GRAPH_BYTES, FIRST_GRAPH_BYTES = 32, 8 * MIB, 64 * MIB
"""Captures of a decode step, one for each bucket of batch sizes, and what each of them holds."""
PACKED_BYTES = 1.5
"""A weight has less on average where most are packed."""
BLOCK_BYTES = 0.45
"""And less than that where most are in formats that are made numbers for every product."""
ALLOCATOR_SLACK = 1.05
"""What torch's caching allocator reserves for a byte that is asked for."""


def weights_dtype(config: EngineConfig, hf_config: Mapping[str, Any]) -> str:
    """Returns the number format of the weights: as asked, or as a config.json names it
    (transformers 5 and before), or bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    return str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "bfloat16")


def resolve_kv_formats(config: EngineConfig, device: str, dtype: str) -> KVFormats:
    """Returns the formats of keys and values; "auto" is that of the weights on a GPU, and float32,
    which every CPU computes in, elsewhere."""
    if config.kv_cache_dtype != "auto":
        return kv_formats(config.kv_cache_dtype)
    return kv_formats(dtype if device == "cuda" else "float32")


def check_context(config: EngineConfig, spec: ModelSpec) -> None:
    """Raises ConfigError if the context asked for is longer than the model can read."""
    wanted, trained = config.max_model_len, spec.trained_len
    if wanted is None or wanted <= trained or config.allow_longer_than_trained:
        return
    kinds = " and ".join(dict.fromkeys(rope.type for rope in spec.ropes))
    stretched = f", which {kinds} RoPE stretches to {trained}"
    raise ConfigError(
        f"max_model_len {wanted} is more than the {trained} tokens that the model was trained for "
        f"(max_position_embeddings {spec.max_position_embeddings}"
        f"{stretched if trained > spec.max_position_embeddings else ''}): beyond them its answers "
        f"are wrong; use at most {trained}, or allow_longer_than_trained "
        "(--allow-longer-than-trained) if you know better",
        field="max_model_len",
    )


def as_shared(spec: ModelSpec, config: EngineConfig) -> ModelSpec:
    """Returns a model as its ranks are to share it. Raises ConfigError if they cannot."""
    return spec.with_whole_experts() if config.enable_expert_parallel else spec


def plan_model(
    spec: ModelSpec,
    *,
    weights_bytes: int,
    dtype: str,
    config: EngineConfig,
    device: str,
    memory: DeviceMemory,
    activation_bytes: int | None = None,
) -> MemoryPlan:
    """Returns the plan of one rank of a model on a device called `device` ("cpu" or "cuda").

    `weights_bytes` are those of the whole model, and `dtype` is that of the weights
    (`weights_dtype`); `activation_bytes` replaces the bound by what was measured. Raises
    CapacityError saying what would fit, and ConfigError if the ranks cannot share the model, its
    context is too long or the device cannot compute it.
    """
    check_context(config, spec)
    kv = resolve_kv_formats(config, device, dtype)
    backend, wants = config.resolved_attention_backend(), spec.attention_wants(kv)
    check_kv_formats(backend, device, wants)
    check_backend(backend, device, wants)
    num_ranks = config.tensor_parallel_size
    is_packed = weights_bytes < PACKED_BYTES * spec.num_parameters
    check_activations(
        config.activation_dtype, backend, device, is_packed=is_packed, num_ranks=num_ranks
    )
    if num_ranks > 1:
        whole, spec = spec, as_shared(spec, config).of_rank(num_ranks)
        weights_bytes = weights_bytes * spec.num_parameters // whole.num_parameters
    specs = spec.kv_specs(kv)
    if device == "cuda":
        in_blocks = weights_bytes < BLOCK_BYTES * spec.num_parameters
        graphs = _graph_bytes(spec, config, in_blocks=in_blocks)
        budget = gpu_budget(memory, config.gpu_memory_utilization, graphs)
        room = max(budget.usable_bytes - weights_bytes, 0)
        groups = [group for group in group_layers(specs) if not group.is_state]
        kv_tokens = room // min(group.num_slots * group.spec.token_bytes for group in groups)
        # Of FP8 made here rows have one scale, and are multiplied as they are.
        is_unpacked = weights_bytes < PACKED_BYTES * spec.num_parameters
        is_unpacked &= config.quantization != "fp8" and not config.deterministic
        step_bytes = _gpu_step(
            *(spec, config, kv, 4 if dtype == "float32" else 2, kv_tokens),
            is_unpacked=is_unpacked,
            in_blocks=in_blocks,
        )
        is_plain = not (is_packed or config.deterministic or kv_is_quantized(kv))
        is_plain &= not any(layer.attention.expanded_size for layer in spec.layers)
        if is_plain and num_ranks > 1:
            budget = _with_long_graphs(budget, config, step_bytes)
    else:
        # The ranks and the engines of a host share its memory.
        available = memory.available_bytes // (num_ranks * config.data_parallel_size)
        budget = host_budget(available, config.gpu_memory_utilization)
        step_bytes = _cpu_step(spec, config)
    return plan_memory(
        specs,
        weights_bytes=weights_bytes,
        activation_bytes=step_bytes if activation_bytes is None else lambda _: activation_bytes,
        config=config,
        max_position_embeddings=spec.default_len,
        budget=budget,
    )


def with_others(error: CapacityError, device: Device) -> CapacityError:
    """Returns the error, saying also who else uses the device."""
    others = device.other_processes()
    if others is None:
        return error
    count = "of unknown number" if others.count is None else str(others.count)
    return CapacityError(
        f"{error}. Other processes on the GPU: {count}, with {gib(others.used_bytes)}",
        field=error.field,
    )


def _cpu_step(spec: ModelSpec, config: EngineConfig) -> Callable[[int], int]:
    widest = ActivationShape(
        hidden_size=spec.hidden_size,
        qkv_size=max(layer.attention.projected_size for layer in spec.layers),
        mlp_size=max(_mlp_size(layer.mlp, spec.hidden_size) for layer in spec.layers),
        vocab_size=spec.vocab_size,
    )
    return lambda num_tokens: widest.step_bytes(num_tokens, min(num_tokens, config.max_num_seqs))


def kv_is_quantized(kv: KVFormats) -> bool:
    """Whether keys or values are stored as codes."""
    return kv.key.is_quantized or kv.value.is_quantized


def _with_long_graphs(
    budget: Budget, config: EngineConfig, step_bytes: Callable[[int], int]
) -> Budget:
    """Returns the budget of ranks that replay longer prompts too: launched kernel by kernel, these
    wait for the host, which one GPU does not (docs/scaling.md). Their graphs share memory with
    those of shorter ones."""
    if config.enforce_eager:
        return budget
    longest, most = MAX_PADDED_PROMPT_TOKENS, config.max_num_batched_tokens
    longest = longest if most is None else min(longest, most)
    more = max(step_bytes(longest) - step_bytes(MAX_PADDED_TOKENS), 0)
    return replace(
        budget,
        graph_bytes=budget.graph_bytes + more,
        max_padded_tokens=MAX_PADDED_PROMPT_TOKENS,
    )


def _graph_bytes(spec: ModelSpec, config: EngineConfig, *, in_blocks: bool) -> int:
    """Returns a bound on the bytes that captured steps keep to themselves, and sums over ranks."""
    peers = PEER_BYTES if config.tensor_parallel_size > 1 else 0
    if config.enforce_eager:
        return peers
    made = 0
    if in_blocks:
        rows = config.max_num_seqs
        each = (_unpacked(layer, spec.hidden_size, rows, in_blocks=True) for layer in spec.layers)
        made = max(map(max, each))
    return peers + FIRST_GRAPH_BYTES + GRAPH_CAPTURES * GRAPH_BYTES + made


def _gpu_step(
    spec: ModelSpec,
    config: EngineConfig,
    kv: KVFormats,
    element_bytes: int,
    kv_tokens: int,
    *,
    is_unpacked: bool = False,
    in_blocks: bool = False,
) -> Callable[[int], int]:
    """Returns a bound on the bytes of a step of so many tokens in the Triton back end.

    A step lives in turn through attention and MLP of every layer, and the sampler: residual and
    input are there all the time, and what a phase leaves is the next one's room.
    `kv_tokens` is at least what one KV group can hold. `is_unpacked`: whether weights are packed,
    so that many tokens have those of a layer made numbers; `in_blocks`: so that any have.
    """
    longest = min(config.max_model_len or spec.default_len, kv_tokens)
    tables = 4 * longest * sum(rope.rotary_dim for rope in spec.ropes)
    unpacked = UNPACKED_BYTES if kv_is_quantized(kv) else 0

    def step_bytes(num_tokens: int) -> int:
        num_samples = min(num_tokens, config.max_num_seqs)
        phases = [num_samples * (spec.hidden_size * element_bytes + 2 * 4 * spec.vocab_size)]
        for layer in dict.fromkeys(spec.layers):
            partials = _partials(layer, config, num_tokens, longest)
            width = layer.attention.projected_size + layer.attention.attended_size
            expanded = layer.attention.expanded_size * element_bytes
            room = unpacked if num_tokens > MAX_PADDED_TOKENS and not expanded else 0
            dense, experts = (0, 0)
            if is_unpacked or in_blocks:
                dense, experts = _unpacked(layer, spec.hidden_size, num_tokens, in_blocks=in_blocks)
            own = max(partials + room, expanded, dense)
            phases.append(num_tokens * width * element_bytes + own)
            mlp = num_tokens * _mlp_bytes(layer.mlp, spec.hidden_size, element_bytes)
            phases.append(mlp + max(dense, experts))
        through = 2 * num_tokens * spec.hidden_size * element_bytes
        return int(ALLOCATOR_SLACK * (tables + through + max(phases)))

    return step_bytes


def _unpacked(
    layer: LayerSpec, hidden_size: int, num_tokens: int, *, in_blocks: bool
) -> tuple[int, int]:
    """Bytes of packed weights that are made numbers for so many tokens: of the largest matrix, and
    of the experts. `in_blocks`: those of few tokens are as well, of an expert for each pair."""
    mlp, widest = layer.mlp, layer.attention.projected_size
    experts = 0
    if isinstance(mlp, MLPSpec):
        widest = max(widest, 2 * mlp.size)
    else:
        widest = max(widest, 2 * mlp.shared_size)
        sizes = mlp.num_experts, mlp.expert_size, hidden_size
        if unpacks_experts(num_tokens * mlp.top_k, *sizes):
            gates = 2 * -(-mlp.num_experts // UNPACKED_PARTS)
            experts = 2 * max(gates, mlp.num_experts) * mlp.expert_size * hidden_size
        elif in_blocks:
            chosen = min(num_tokens * mlp.top_k, mlp.num_experts)
            experts = 2 * 2 * chosen * mlp.expert_size * hidden_size
    is_made = in_blocks or num_tokens >= UNPACKED_TOKENS
    dense = 2 * widest * hidden_size if is_made else 0
    return dense, experts


def _partials(layer: LayerSpec, config: EngineConfig, num_tokens: int, longest: int) -> int:
    """Bytes of partial results: of decodes, or after them those of short chunks. Each is float32
    [heads, numbers] and a log-sum-exp a head. What the cache holds is no bound of them: rows that
    share blocks see more than that together."""
    spec = layer.attention
    visible = min(longest, spec.visibility.most_visible or longest)
    rows = min(config.max_num_seqs, num_tokens)
    if config.deterministic:
        rows = min(max(config.max_num_seqs, DETERMINISTIC_TOKENS), num_tokens)
        decode = rows * split_partials(visible)
    else:
        decode = spec.lone_partials(rows, visible)
    short = min(num_tokens, spec.short_tokens) * SHORT_SPLITS
    return max(decode, short) * 4 * spec.num_heads * (spec.partial_size + 1)


def _mlp_bytes(mlp: MLPSpec | MoESpec, hidden_size: int, element_bytes: int) -> int:
    """Bytes of one token in the MLP's worst moment: gate and up with their product, or that and the
    output."""
    if isinstance(mlp, MLPSpec):
        return max(3 * mlp.size, mlp.size + hidden_size) * element_bytes
    per_pair = (mlp.expert_size + hidden_size) * element_bytes
    # A pair's weight, id, count, place in the order and share of a block's description.
    routing = mlp.num_experts * element_bytes + mlp.top_k * 24
    routed = mlp.top_k * per_pair + hidden_size * element_bytes
    shared = (3 * mlp.shared_size + 2 * hidden_size) * element_bytes
    return routing + max(routed, shared)


def _mlp_size(mlp: MLPSpec | MoESpec, hidden_size: int) -> int:
    """Gate and up columns of one token; a MoE token also has its input and output per expert."""
    if isinstance(mlp, MoESpec):
        return mlp.top_k * (2 * mlp.expert_size + 2 * hidden_size) + 2 * mlp.shared_size
    return 2 * mlp.size
