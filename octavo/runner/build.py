"""Puts a runner together: ops, weights, KV storage, sampler.

Called by the engine at start, after the memory plan. It decides nothing that the plan or the
options have decided.
"""

from __future__ import annotations

import torch

from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.kernels.registry import select_ops
from octavo.kv_cache.planner import MemoryPlan
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import load_decoder
from octavo.models.family import Family
from octavo.models.spec import ModelSpec
from octavo.runner.model_runner import ModelRunner
from octavo.runner.sampler import Sampler
from octavo.weights.placement import HostPlacement
from octavo.weights.source import TensorSource


def build_runner(
    config: EngineConfig, spec: ModelSpec, family: Family, source: TensorSource, plan: MemoryPlan
) -> ModelRunner:
    """Returns a runner that holds itself to `plan`, with weights loaded.

    Sets torch's threads for the whole process, to what the chosen ops leave it. Raises ConfigError
    if no back end fits and WeightsError on a broken tensor.
    """
    num_threads = config.num_threads or select_device(config.device).num_cores()
    ops = select_ops(config.resolved_attention_backend(), num_threads)
    torch.set_num_threads(ops.torch_threads)
    return ModelRunner(
        decoder=load_decoder(spec, family, HostPlacement(source), ops, plan.max_model_len),
        storage=KVStorage(plan.groups, plan.num_blocks, plan.block_size),
        sampler=Sampler(spec.vocab_size, config.max_num_seqs),
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
        poison_freed_blocks=config.poison_freed_blocks,
    )
