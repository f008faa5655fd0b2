"""From options to a loaded engine core, in the order that fails early and says why.

Called by LLM and by `engine.process`. Order: find the files, read the spec, map the weights (reads
no data yet), plan the memory, and only then build the runner.
"""

from __future__ import annotations

from octavo.config import EngineConfig
from octavo.engine.core import EngineCore
from octavo.engine.memory import plan_model
from octavo.kv_cache.planner import available_memory
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
    plan = plan_model(
        spec,
        weights_bytes=source.nbytes,
        config=config,
        available_bytes=available_memory(),
    )
    runner = build_runner(config, spec, family, source, plan)
    identity = f"{files.identity}|{config.dtype}|{config.seed}"
    return EngineCore(config, plan, runner, identity)
