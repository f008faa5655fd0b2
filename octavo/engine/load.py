"""From options to a loaded engine core, in the order that fails early and says why.

Called by LLM, by `engine.process` and by every rank. Order: find the files, read the spec, map the
weights (reads no data yet), plan the memory, and only then build the runner.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from octavo.config import EngineConfig
from octavo.config.environment import rank_key
from octavo.config.fields import read_address
from octavo.device import return_free_memory, select_device
from octavo.engine.core import EngineCore
from octavo.engine.executor import start_ranks
from octavo.engine.memory import as_shared, plan_model, weights_dtype, with_others
from octavo.engine.prefixes import model_identity
from octavo.engine.rank_transport import RankTransport, RemoteRanks
from octavo.engine.sample_text import SAMPLE_TEXT
from octavo.errors import CapacityError, ModelNotFoundError
from octavo.formats import kv_formats
from octavo.grammar import Guides, Vocabulary
from octavo.kv_cache.planner import MemoryPlan
from octavo.models.family import ignorable_names, weight_shapes
from octavo.models.registry import read_spec
from octavo.observe.progress import UNWATCHED, Progress
from octavo.parallel import ALONE, Collectives
from octavo.runner.build import build_runner
from octavo.step import Runner
from octavo.weights.hub import ModelFiles
from octavo.weights.loader import check_names, open_source
from octavo.weights.quantization import check_kv_cache, check_quantization

if TYPE_CHECKING:
    from octavo.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_MASK_THREADS = 8
MAX_SAMPLE = 512
"""Tokens of a sample."""


def load_core(
    config: EngineConfig,
    files: ModelFiles,
    progress: Progress = UNWATCHED,
    tokenizer: Tokenizer | None = None,
    first_device: int = 0,
    transport: RankTransport | None = None,
    is_in_fleet: bool = False,
) -> EngineCore:
    """Returns an engine core that is ready to step; `tokenizer` is the model's, if this process has
    it already, `first_device` the first of its ranks' GPUs, `transport` how they are started.
    One of a fleet notes what it holds (`take_changes`).
    Raises ModelError, CapacityError."""
    if config.tensor_parallel_size == 1:
        runner, plan = load_runner(config, files, ALONE, progress, first_device, tokenizer)
    else:
        as_shared(read_spec(files.config, files.modules)[0], config).of_rank(
            config.tensor_parallel_size
        )  # refused before it starts
        load = partial(load_runner, config, files, progress=progress, device_index=first_device)
        transport = transport or awaited_ranks(config)
        runner, plan = start_ranks(config, files, load, first_device, transport)
    identity = model_identity(config, files)
    guides = _guides(config, files, tokenizer)
    return EngineCore(config, plan, runner, identity, guides, is_in_fleet)


def _guides(config: EngineConfig, files: ModelFiles, tokenizer: Tokenizer | None) -> Guides:
    vocab_size = read_spec(files.config)[0].vocab_size
    num_threads = min(
        MAX_MASK_THREADS,
        max(1, select_device(config.device).num_cores() // config.data_parallel_size),
    )

    def vocabulary() -> Vocabulary:
        from octavo.engine.tokenizer import find_tokenizer  # for grammars alone, which few ask for

        return (tokenizer or find_tokenizer(config, files)).vocabulary()

    return Guides(vocabulary, vocab_size, num_threads)


def awaited_ranks(config: EngineConfig) -> RankTransport | None:
    """Returns how the ranks of `octavo rank` come, if others are to start them. Raises
    ConfigError."""
    if config.rank_address is None:
        return None
    host, port = read_address("rank_address", config.rank_address)

    def announce(address: str, key: bytes) -> None:
        last = config.tensor_parallel_size - 1
        logger.warning(
            "rank 0 of %d waits at %s; for each N of 1 to %d start on its host, with the same "
            "OCTAVO_RANK_KEY: octavo rank --address %s --rank N",
            *(config.tensor_parallel_size, address, last, address),
        )

    return RemoteRanks(host, announce, port=port, key=rank_key())


def load_runner(
    config: EngineConfig,
    files: ModelFiles,
    collectives: Collectives,
    progress: Progress = UNWATCHED,
    device_index: int = 0,
    tokenizer: Tokenizer | None = None,
) -> tuple[Runner, MemoryPlan]:
    """Returns one rank's runner and the plan that all ranks hold themselves to; `tokenizer` is the
    model's, if this process has it already."""
    spec, family = read_spec(files.config, files.modules)
    spec = as_shared(spec, config)
    check_quantization(config.quantization, files.quantization, is_dummy=files.kind == "config")
    check_kv_cache(config.kv_cache_dtype, files.quantization)
    shapes = weight_shapes(spec, family)
    source = open_source(files, config.dtype, shapes, config.seed, config.quantization)
    check_names(source, shapes, ignorable_names(spec, family))
    device = select_device(config.device, device_index)
    memory = device.memory()

    def plan_with(activation_bytes: int | None = None) -> MemoryPlan:
        try:
            plan = plan_model(
                spec,
                weights_bytes=source.nbytes,
                dtype=weights_dtype(config, files.config),
                config=config,
                device=device.name,
                memory=memory,
                activation_bytes=activation_bytes,
            )
        except CapacityError as error:
            raise with_others(error, device) from error
        return _agreed(plan, collectives)

    built = build_runner(
        *(config, spec, family, source, plan_with, collectives, progress, device_index),
        partial(sample_ids, config, files, tokenizer),
    )
    return_free_memory()
    return built


def sample_ids(
    config: EngineConfig, files: ModelFiles, tokenizer: Tokenizer | None = None
) -> list[int]:
    """Returns the ids of the text from which compressed keys learn what they have in common; none
    where they are not compressed, weights are made up, or there is no tokenizer."""
    from octavo.engine.tokenizer import find_tokenizer  # for compressed keys alone

    name = config.kv_cache_dtype
    is_compressed = name != "auto" and kv_formats(name).key.is_quantized
    if not is_compressed or files.kind == "config" or config.skip_tokenizer_init:
        return []
    try:
        tokenizer = tokenizer or find_tokenizer(config, files)
    except ModelNotFoundError as error:
        logger.info("compressed keys are not centred: %s", error)
        return []
    return tokenizer.encode(SAMPLE_TEXT)[:MAX_SAMPLE]


def _agreed(plan: MemoryPlan, collectives: Collectives) -> MemoryPlan:
    """Returns the plan with what the rank that has least can do."""
    wanted = (plan.num_chunks, plan.max_model_len, plan.max_num_batched_tokens)
    num_chunks, max_model_len, max_num_batched_tokens = collectives.least(wanted)
    return replace(
        plan,
        num_chunks=num_chunks,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
    )
