"""Puts a runner together: ops, weights, KV storage, sampler.

Called by the engine at start, after the memory plan. It decides nothing that the plan or the
options have decided.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from octavo.config import EngineConfig, tuned_dir
from octavo.device import select_device
from octavo.formats import kv_formats
from octavo.kernels.backend import KernelBuilds, SamplingKernels, StepRecorder
from octavo.kernels.inputs import LatentOp
from octavo.kernels.planning import AttentionPlanner, PlanLimits, PlannedGroup
from octavo.kernels.registry import Needs, select_backend
from octavo.kv_cache.planner import MemoryPlan, gib
from octavo.kv_cache.spec import KVGroup
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.models.family import Family
from octavo.models.kv_scales import with_kv_scales
from octavo.models.load_decoder import load_decoder
from octavo.models.sampled_keys import LEAST_TOKENS, with_room
from octavo.models.spec import ModelSpec
from octavo.observe.progress import UNWATCHED, Progress
from octavo.parallel import ALONE, Collectives
from octavo.runner.device import device_equipment
from octavo.runner.device_batch import largest_upload
from octavo.runner.device_sampler import DeviceSampler
from octavo.runner.graphs import StepGraphs
from octavo.runner.host import host_equipment
from octavo.runner.lane import make_lane
from octavo.runner.model_runner import ModelRunner
from octavo.runner.rehearsal import Rehearsal
from octavo.runner.sample_keys import learn_keys
from octavo.runner.sampler import Sampler
from octavo.runner.transfer import make_transfer
from octavo.runner.warm_up import (
    steps_to_build,
    steps_to_capture,
    steps_to_run,
    without_tokens,
)
from octavo.step import Runner
from octavo.weights.placement import DevicePlacement, HostPlacement
from octavo.weights.source import TensorSource

logger = logging.getLogger(__name__)

MAX_BUILDERS = 32
"""Threads that build kernels; more than there are builds of any length."""

Planner = Callable[[int | None], MemoryPlan]
"""Plans with what a step was seen to take, or with what it should take."""


def build_runner(
    config: EngineConfig,
    spec: ModelSpec,
    family: Family,
    source: TensorSource,
    planner: Planner,
    collectives: Collectives = ALONE,
    progress: Progress = UNWATCHED,
    device_index: int = 0,
    sample: Callable[[], Sequence[int]] = tuple,
) -> tuple[Runner, MemoryPlan]:
    """Returns a rank's runner with weights loaded, and the plan that it holds itself to.

    `device_index` counts the GPUs that this process sees; `sample` returns the ids of a text from
    which compressed keys learn what they have in common. Sets torch's threads for the whole
    process, to what the chosen ops leave it. Raises ConfigError if no back end fits and
    WeightsError on a broken tensor.
    """
    rank, size = collectives.rank, collectives.size
    device = select_device(config.device, device_index)
    plan = planner(None)
    needs = Needs(
        device=torch.device(device.torch_name),
        # The ranks and the engines of a host share its cores.
        num_threads=config.num_threads
        or max(1, device.num_cores() // (size * config.data_parallel_size)),
        attention=spec.attention_wants(kv_formats(plan.groups[0].spec.formats)),
        is_deterministic=config.deterministic,
        rounds_activations=config.dtype == "bfloat16",
        rounds_to_int8=config.activation_dtype == "int8",
        tuned_folder=Path(tuned_dir()),
    )
    backend = select_backend(config.resolved_attention_backend(), needs)
    ops = backend.ops
    torch.set_num_threads(ops.torch_threads)
    is_mapped = backend.maps_weights and size == 1
    placement = (
        HostPlacement(source)
        if is_mapped
        else DevicePlacement(
            *(source, needs.device, rank, size), keeps_packed=not backend.maps_weights
        )
    )
    began = time.perf_counter()
    decoder = load_decoder(spec, family, placement, ops, plan.max_model_len, collectives)
    logger.info("weights are there after %.1f s", time.perf_counter() - began)
    if backend.over_peers is not None and size > 1:
        table = decoder.embedding
        dtype = table.data.dtype if table.planes is None else torch.bfloat16
        collectives = backend.over_peers(collectives, spec.hidden_size, dtype, needs.device)
        decoder = replace(decoder, collectives=collectives)
    if needs.attention.kv.name == "fp8":
        decoder = with_kv_scales(decoder, family, source)
    decoder = replace(decoder, progress=progress)
    make_lane(needs.device).reclaim()  # what weights were made in
    if backend.builds is not None:
        backend.builds.tell_builds(progress)
    ids = sample()
    ids = ids[: collectives.least([len(ids)])[0]]  # all ranks learn, or none
    if len(ids) >= LEAST_TOKENS:
        decoder = with_room(decoder, needs.device)
    if backend.sampling is None:
        return _host_runner(config, plan, decoder, backend.recorder, ids), plan
    runner, rehearsal = _device_runner(config, plan, decoder, backend.sampling, needs.device)
    if needs.device.type == "cuda":
        warm_up(rehearsal, config, plan, spec, backend.builds, needs.num_threads)
    step_bytes = -collectives.least([-rehearsal.step_bytes])[0]
    if step_bytes > plan.activation_bytes:
        logger.warning(
            "a step takes %s, planned were %s; the KV cache gets the difference less",
            gib(step_bytes),
            gib(plan.activation_bytes),
        )
        plan = planner(step_bytes)
    runner.storage.allocate(plan.num_chunks)
    _have_keys_learn(config, plan, decoder, runner.storage, ids)
    if needs.device.type == "cuda" and not config.enforce_eager:
        capture(rehearsal, config, plan, spec)
    return runner, plan


def _host_runner(
    config: EngineConfig,
    plan: MemoryPlan,
    decoder: Decoder,
    recorder: StepRecorder | None,
    sample_ids: Sequence[int],
) -> ModelRunner:
    storage = KVStorage(plan.groups, plan.num_chunks, plan.block_size)
    sampler = Sampler(decoder.spec.vocab_size, config.max_num_seqs)
    _have_keys_learn(config, plan, decoder, storage, sample_ids)
    attention = _attention_planner(config, plan, decoder, storage.arena.device)
    return ModelRunner(
        decoder,
        storage,
        host_equipment(decoder, storage, attention, sampler, plan.max_model_len, recorder),
        poison_freed_blocks=config.poison_freed_blocks,
    )


def _have_keys_learn(
    config: EngineConfig,
    plan: MemoryPlan,
    decoder: Decoder,
    storage: KVStorage,
    sample_ids: Sequence[int],
) -> None:
    """Reads the sample through layers `with_room`; all ranks do, or none."""
    if len(sample_ids) < LEAST_TOKENS:
        return
    began = time.perf_counter()
    planner = _attention_planner(config, plan, decoder, storage.arena.device)
    count = learn_keys(decoder, storage, planner, plan, sample_ids)
    took = time.perf_counter() - began
    logger.info("keys have learned from %d tokens after %.1f s", count, took)


def _device_runner(
    config: EngineConfig,
    plan: MemoryPlan,
    decoder: Decoder,
    sampling: SamplingKernels,
    device: torch.device,
) -> tuple[ModelRunner, Rehearsal]:
    # What a warm-up needs; the rest comes when it has shown what a step takes.
    storage = KVStorage(plan.groups, 1, plan.block_size, device)
    transfer = make_transfer(device, largest_upload(plan))
    vocab_size, max_num_seqs = decoder.spec.vocab_size, config.max_num_seqs
    sampler = DeviceSampler(vocab_size, max_num_seqs, device, sampling, transfer.upload)
    graphs = StepGraphs(is_on=device.type == "cuda" and not config.enforce_eager)
    attention = _attention_planner(config, plan, decoder, device)
    runner = ModelRunner(
        decoder,
        storage,
        device_equipment(
            *(decoder, storage, attention, sampler, graphs, transfer, plan.max_model_len),
            max_padded_tokens=plan.max_padded_tokens,
        ),
        poison_freed_blocks=config.poison_freed_blocks,
    )
    return runner, Rehearsal(runner, graphs, device)


def _attention_planner(
    config: EngineConfig, plan: MemoryPlan, decoder: Decoder, device: torch.device
) -> AttentionPlanner:
    limits = PlanLimits(
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
        kv_tokens=plan.num_tokens,
    )
    groups = planned_groups(decoder, plan.groups, plan.block_size)
    return decoder.ops.planner(groups, limits, device)


def planned_groups(
    decoder: Decoder, groups: Sequence[KVGroup], block_size: int
) -> list[PlannedGroup]:
    """Returns the KV groups as a planner of attention sees them. A group's layers are alike."""
    found: list[PlannedGroup] = []
    for group in groups:
        asked = [decoder.layers[index].mixer.op for index in group.layers]
        ((num_heads, num_kv_heads),) = {(op.num_heads, op.num_kv_heads) for op in asked}
        latent = [op for op in asked if isinstance(op, LatentOp)]
        found.append(
            PlannedGroup(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                is_latent=len(latent) == len(asked),
                expanding_queries=max((op.expanding_queries for op in latent), default=0),
                visibility=group.spec.visibility,
                token_bytes=len(group.layers) * group.spec.token_bytes,
                block_size=block_size,
            )
        )
    return found


def warm_up(
    rehearsal: Rehearsal,
    config: EngineConfig,
    plan: MemoryPlan,
    spec: ModelSpec,
    builds: KernelBuilds | None,
    num_threads: int,
) -> None:
    """Has the kernels built that steps will want, side by side, and runs some steps."""
    tokens = min(plan.max_num_batched_tokens, plan.max_model_len)
    sizes = config.max_num_seqs, tokens
    fitting = iter if spec.pooling is None else without_tokens
    if builds is not None and builds.can_build():
        began = time.perf_counter()
        with builds.building(min(num_threads, MAX_BUILDERS)):
            for step in fitting(steps_to_build(*sizes, plan.max_model_len, spec.vocab_size)):
                rehearsal.build(step)
        logger.info("kernels are there after %.1f s", time.perf_counter() - began)
    for step in fitting(steps_to_run(*sizes, spec.vocab_size)):
        rehearsal.run(step)


def capture(rehearsal: Rehearsal, config: EngineConfig, plan: MemoryPlan, spec: ModelSpec) -> None:
    """Has the graphs of small steps captured, so that no request waits for one."""
    began = time.perf_counter()
    sizes = config.max_num_seqs, plan.max_num_batched_tokens, plan.max_model_len
    fitting = iter if spec.pooling is None else without_tokens
    for step in fitting(steps_to_capture(*sizes, spec.vocab_size, plan.max_padded_tokens)):
        rehearsal.capture(step)
    logger.info("graphs are there after %.1f s", time.perf_counter() - began)
