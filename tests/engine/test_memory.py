"""Plans of real shapes on a real card's numbers: what the GPU engine counts on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.device import CPUDevice, CUDADevice, DeviceMemory
from octavo.engine.memory import plan_model, resolve_kv_formats, weights_dtype, with_others
from octavo.errors import CapacityError, ConfigError
from octavo.kernels.facts import (
    PEER_BYTES,
    SHARED_SPLITS,
    lone_partials,
    most_lone_partials,
    split_partials,
    unpacks_experts,
)
from octavo.kv_cache.planner import GIB, MemoryPlan
from octavo.models.registry import read_spec
from octavo.step import MAX_PADDED_PROMPT_TOKENS, MAX_PADDED_TOKENS
from tests.gpu_probe import Probe

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 151936,
}
QWEN15_MOE = QWEN3_30B | {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "head_dim": 128,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
}
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
CARD = DeviceMemory(total_bytes=int(79.18 * GIB), available_bytes=int(78.68 * GIB))


def plan(config: dict[str, Any], weights: float, **options: Any) -> MemoryPlan:
    spec, _ = read_spec(config)
    measured = options.pop("measured", None)
    return plan_model(
        spec,
        weights_bytes=int(weights * GIB),
        dtype="bfloat16",
        config=dataclasses.replace(EngineConfig(model="m"), **options),
        device="cuda",
        memory=CARD,
        activation_bytes=measured,
    )


@pytest.mark.parametrize(
    ("config", "weights", "token_kib", "num_tokens"),
    [(QWEN3_30B, 56.88, 96, 140_000), (QWEN15_MOE, 26.68, 192, 236_000)],
)
def test_a_card_of_80_gb_holds_the_tokens_that_other_engines_hold(
    config: dict[str, Any], weights: float, token_kib: int, num_tokens: int
) -> None:
    made = plan(config, weights)
    assert made.kv_token_bytes == token_kib * 1024
    assert made.num_tokens >= num_tokens
    assert made.max_num_batched_tokens == 8192
    assert made.max_model_len == 40960


def test_activations_are_bound_by_the_widest_moment_of_a_step() -> None:
    def mib(**options: Any) -> float:
        return plan(QWEN3_30B, 56.88, **options).activation_bytes / 2**20

    # One sequence: 8192 tokens x (residual, input, 8 pairs of hidden and part, output), 16 bits.
    experts = 8192 * (2048 * 2 + 8 * (768 + 2048) + 2048) * 2 / 2**20
    assert 1.05 * experts < mib(max_num_seqs=1) < 1.15 * experts
    # 256 rows of 40960 tokens: 81 slots of 32 heads of 128 float32 numbers each.
    assert mib() > mib(max_num_seqs=1) + 100
    # A step of one block: the logits and their scratch.
    assert 16 * 151936 * 8 / 2**20 < mib(max_num_seqs=256, max_num_batched_tokens=16) < 64
    assert mib(measured=2**20) == 1


def test_latent_attention_has_room_for_what_its_kernels_leave_and_no_more() -> None:
    def mib(**options: Any) -> float:
        made = plan(DEEPSEEK_V2_LITE, 29.26, max_model_len=40_960, **options)
        return made.activation_bytes / 2**20

    # The first layer's gate and up with their product, of 8192 tokens, are more than attention has.
    widest = 8192 * (2 * 2048 + 3 * 10944) * 2 / 2**20
    assert 1.05 * widest < mib(max_num_seqs=1) < 1.07 * widest + 16
    # 256 rows leave a partial result each, and 16 of what they share, whatever they see.
    assert mib() == mib(max_num_seqs=1)
    # Deterministic ones leave all their splits: 81 of 16 heads of 513 float32 numbers each.
    splits = 256 * 81 * 16 * 513 * 4 / 2**20
    assert mib(deterministic=True) > splits
    assert plan(DEEPSEEK_V2_LITE, 29.26, max_model_len=40_960).num_tokens > 1_400_000


@pytest.mark.parametrize("most", [1, 2, 31, 132, 133, 256, 1024])
def test_no_number_of_single_queries_leaves_more_partial_results_than_planned(most: int) -> None:
    for seen in (1, 64, 5000, 163_840):
        room = most_lone_partials(most, seen)
        for rows in range(1, most + 1):
            assert rows * (SHARED_SPLITS + lone_partials(rows, seen)) <= room
            assert lone_partials(rows, seen) <= split_partials(seen)


def test_a_rank_has_its_part_of_weights_and_keys() -> None:
    whole, half = plan(QWEN3_30B, 56.88), plan(QWEN3_30B, 56.88, tensor_parallel_size=2)
    # Embedding and routers are whole on both.
    assert 28.44 < half.weights_bytes / GIB < 28.8
    assert half.kv_token_bytes == whole.kv_token_bytes // 2
    # 4 kv heads: two ranks have each of them.
    assert plan(QWEN3_30B, 56.88, tensor_parallel_size=8).kv_token_bytes == 24 * 1024
    with pytest.raises(ConfigError, match="3 cannot share 32 query heads evenly; use 1 or 2 or 4"):
        plan(QWEN3_30B, 56.88, tensor_parallel_size=3)


def test_steps_that_unpack_a_layer_have_room_for_it() -> None:
    def mib(tokens: int, **changes: Any) -> float:
        many = {"max_num_batched_tokens": tokens, **changes}
        return plan(QWEN3_30B, 17.0, **many).activation_bytes / 2**20

    # Gate and up of half of the experts, then down of all.
    experts = 2 * 128 * 768 * 2048 / 2**20
    rows = 8192 * (2048 * 2 + 8 * (768 + 2048) + 2048) * 2 / 2**20
    assert mib(8176) < rows + experts < mib(8192) < 1.1 * (rows + experts)  # 512 rows an expert
    assert mib(8192, quantization="fp8") < rows + experts
    assert mib(8192, deterministic=True) < mib(8192)


def test_formats_that_every_product_unpacks_have_room_in_every_step_and_in_graphs() -> None:
    def made(weights: float, **options: Any) -> MemoryPlan:
        return plan(QWEN3_30B, weights, max_num_batched_tokens=64, **options)

    # Of fewer than four bits: gate and up of all experts, as 64 tokens have more pairs than those.
    experts = 2 * 2 * 128 * 768 * 2048
    few, many = made(10.0), made(17.0)
    assert experts < few.activation_bytes < many.activation_bytes + 1.1 * experts
    assert many.activation_bytes < experts
    assert few.graph_bytes == many.graph_bytes + experts
    assert made(10.0, enforce_eager=True).graph_bytes == 0
    # One token has eight pairs.
    assert made(10.0, max_num_seqs=1).graph_bytes == many.graph_bytes + 2 * 2 * 8 * 768 * 2048


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "sizes", "is_made"),
    [
        (2048, 2, (8, 14336, 4096), False),  # Mixtral-8x7B: 940 MB
        (2064, 2, (8, 14336, 4096), True),
        (8192, 8, (128, 768, 2048), True),  # Qwen3-30B-A3B: 400 MB
        (8176, 8, (128, 768, 2048), False),
        (0, 8, (128, 768, 2048), False),
    ],
)
def test_small_experts_are_made_numbers_from_fewer_rows_on(
    num_tokens: int, top_k: int, sizes: tuple[int, int, int], is_made: bool
) -> None:
    assert unpacks_experts(num_tokens * top_k, *sizes) is is_made


def test_graphs_take_no_memory_where_none_are_captured() -> None:
    assert plan(QWEN3_30B, 56.88).graph_bytes == 320 * 2**20
    assert plan(QWEN3_30B, 56.88, enforce_eager=True).graph_bytes == 0


def test_ranks_replay_longer_prompts_where_they_launch_what_shorter_ones_do() -> None:
    two = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    long, shared = plan(QWEN3_30B, 56.88, **two), 320 * 2**20 + PEER_BYTES
    assert long.max_padded_tokens == MAX_PADDED_PROMPT_TOKENS
    assert shared < long.graph_bytes < shared + 80 * 2**20
    for options in ({"kv_cache_dtype": "int8"}, {"deterministic": True}):
        short = plan(QWEN3_30B, 56.88, **two, **options)
        assert short.max_padded_tokens == MAX_PADDED_TOKENS
        assert short.graph_bytes == shared
    assert plan(QWEN3_30B, 56.88).max_padded_tokens == MAX_PADDED_TOKENS


def test_keys_and_values_have_the_weights_format_on_a_gpu_alone() -> None:
    config = EngineConfig(model="m")
    for dtype in ("bfloat16", "float16", "float32"):
        assert resolve_kv_formats(config, "cuda", dtype).name == dtype
    assert resolve_kv_formats(config, "cpu", "bfloat16").name == "float32"
    asked = dataclasses.replace(config, kv_cache_dtype="float16")
    assert resolve_kv_formats(asked, "cuda", "bfloat16").name == "float16"
    assert weights_dtype(config, QWEN3_30B) == "bfloat16"
    assert weights_dtype(config, {}) == "bfloat16"
    assert weights_dtype(dataclasses.replace(config, dtype="float32"), QWEN3_30B) == "float32"


def test_a_plan_that_fails_on_a_gpu_counts_the_other_processes() -> None:
    error = CapacityError("too large", field="model")
    assert with_others(error, CPUDevice()) is error
    told = with_others(error, CUDADevice(probe=Probe()))
    assert str(told).endswith("Other processes on the GPU: of unknown number, with 4.00 GiB")
    assert told.field == "model"


@pytest.mark.parametrize(
    ("weights", "options", "way_out"),
    [
        (2.0, {}, "quantization int8 or int4"),
        (0.9, {"tensor_parallel_size": 2}, "tensor_parallel_size 1"),
        (0.9, {"attention_backend": "reference"}, "attention_backend auto"),
    ],
)
def test_activations_are_not_rounded_where_nothing_would_be(
    weights: float, options: dict[str, Any], way_out: str
) -> None:
    config = dataclasses.replace(
        EngineConfig(model="m"), activation_dtype="int8", device="cpu", **options
    )
    spec, _ = read_spec(QWEN15_MOE)
    sizes = {"weights_bytes": int(weights * spec.num_parameters), "memory": CARD}
    with pytest.raises(ConfigError, match=f"activation_dtype int8 .* or .*{way_out}"):
        plan_model(spec, dtype="float32", config=config, device="cpu", **sizes)
