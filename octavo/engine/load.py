"""From options to a loaded engine core, in the order that fails early and says why.

Called by LLM and by `engine.process`. Order: find the files, read the spec, map the weights (reads
no data yet), plan the memory, and only then build the runner.
"""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.device import select_device
from octavo.engine.core import EngineCore
from octavo.engine.memory import plan_model, weights_dtype, with_others
from octavo.errors import CapacityError
from octavo.kv_cache.planner import MemoryPlan
from octavo.models.family import ignorable_names, weight_shapes
from octavo.models.registry import read_spec
from octavo.runner.build import build_runner
from octavo.weights.hub import ModelFiles
from octavo.weights.loader import check_names, open_source


def load_core(config: EngineConfig, files: ModelFiles) -> EngineCore:
    """Returns an engine core that is ready to step. Raises ModelError, CapacityError."""
    spec, family = read_spec(files.config)
    shapes = weight_shapes(spec, family)
    source = open_source(files, config.dtype, shapes, config.seed)
    check_names(source, shapes, ignorable_names(spec, family))
    device = select_device(config.device)
    memory = device.memory()

    def plan_with(activation_bytes: int | None = None) -> MemoryPlan:
        try:
            return plan_model(
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

    runner, plan = build_runner(config, spec, family, source, plan_with)
    identity = f"{files.identity}|{config.dtype}|{config.seed}"
    return EngineCore(config, plan, runner, identity)
