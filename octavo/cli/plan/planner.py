"""One model's memory under different options, from its config alone.

Called by `octavo plan` and what reads a model as it does. The plan itself is the engine's own
(`engine.memory`). Never loads a weight.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from octavo.cli.plan.parts import gguf_parts, made_parts, packed_parts, spec_parts
from octavo.config import EngineConfig
from octavo.device import DeviceMemory
from octavo.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from octavo.kv_cache.planner import MemoryPlan
    from octavo.models.family import Family
    from octavo.models.spec import ModelSpec
    from octavo.weights.hub import ModelFiles

Layout = Literal["whole", "parts"]
"""Each rank has some experts whole, or a part of each."""


def read_model(config: EngineConfig) -> tuple[ModelSpec, Family, ModelFiles]:
    """Returns what the config alone says of a model, whose weights need not be there."""
    from octavo.engine.model_kind import with_kind
    from octavo.models.registry import read_spec
    from octavo.weights.hub import resolve_model

    # As for dummy weights: so that no weights have to be there, nor are downloaded.
    files = resolve_model(
        config.model,
        revision=config.revision,
        download_dir=config.download_dir,
        load_format="dummy",
    )
    files = with_kind(dataclasses.replace(config, label_tokens=()), files, None)
    return *read_spec(files.config, files.modules), files


class Planner:
    """Plans one model under different options."""

    def __init__(
        self,
        spec: ModelSpec,
        family: Family,
        files: ModelFiles,
        device: str,
        memory: DeviceMemory,
    ) -> None:
        from octavo.weights.gguf_file import read_gguf

        self.spec = spec
        self._family = family
        self._path = path = files.path
        self._hf_config = files.config
        self._device = device
        self._memory = memory
        self._file = read_gguf(path) if path.suffix == ".gguf" else None
        self._quantization = said = files.quantization
        self._packed = None if said is None or said.may_be_plain else said

    def parts(self, config: EngineConfig) -> dict[str, int]:
        """Returns the bytes of the weights by part of the model."""
        from octavo.engine.memory import weights_dtype
        from octavo.weights.made import can_be_made

        if config.dtype == "auto" and self._file is not None:
            return gguf_parts(self._file)
        if config.dtype == "auto" and self._packed is not None:
            return packed_parts(self.spec, self._family, self._path)
        number_bytes = 4 if weights_dtype(config, self._hf_config) == "float32" else 2
        made, is_dummy = config.quantization, config.load_format == "dummy"
        if made and can_be_made(made, is_dummy=is_dummy) and self._packed is None:
            return made_parts(self.spec, self._family, number_bytes, made)
        return spec_parts(self.spec, number_bytes)

    def plan(self, config: EngineConfig) -> MemoryPlan:
        from octavo.engine.memory import as_shared, plan_model, weights_dtype

        as_shared(self.spec, config).of_rank(config.tensor_parallel_size)  # refused before formats
        self._check_formats(config)
        return plan_model(
            self.spec,
            weights_bytes=sum(self.parts(config).values()),
            dtype=weights_dtype(config, self._hf_config),
            config=config,
            device=self._device,
            memory=self._memory,
        )

    def experts_layout(self, config: EngineConfig) -> Layout | None:
        """Returns how ranks on GPUs should share experts: whole ones, where they can, were quicker
        in every case that was measured (docs/scaling.md). None without ranks or experts."""
        num_ranks = config.tensor_parallel_size
        if num_ranks == 1 or self._device != "cuda" or not self.spec.moe_layers:
            return None
        try:
            self.spec.with_whole_experts().of_rank(num_ranks)
        except ConfigError:
            return "parts"
        return "whole"

    def _check_formats(self, config: EngineConfig) -> None:
        """Refuses what the loader would: weights that stay in a file's blocks, where they have to
        be copied. Raises UnsupportedModelError."""
        from octavo.kernels.limits import check_copied_format, refuse_packed
        from octavo.weights.quantization import check_kv_cache, check_quantization

        check_quantization(
            config.quantization, self._quantization, is_dummy=config.load_format == "dummy"
        )
        check_kv_cache(config.kv_cache_dtype, self._quantization)
        is_copied = self._device == "cuda" or config.tensor_parallel_size > 1
        keeps_packed = self._device == "cuda"
        packed = self._packed if config.dtype == "auto" and is_copied else None
        if packed is not None and not keeps_packed:
            refuse_packed(f"the model is quantised with {packed.method}", self._device)
        if self._file is not None and config.dtype == "auto" and is_copied:
            for name, tensor in self._file.tensors.items():
                if len(tensor.shape) > 1:
                    check_copied_format(
                        name, tensor.format, self._device, keeps_packed=keeps_packed
                    )

    def changes(self, config: EngineConfig, plan: MemoryPlan) -> dict[str, MemoryPlan | str]:
        """Returns for each option that changes the plan the other plan, or why there is none."""
        rest = plan.usable_bytes - plan.total_bytes + plan.kv_bytes
        tries: list[tuple[str, Any]] = [
            ("dtype", "float32"),
            ("dtype", "bfloat16"),
            ("kv_cache_dtype", "float32"),
            ("kv_cache_dtype", "float16"),
            ("kv_cache_dtype", "int8"),
            ("kv_cache_dtype", "int4"),
            ("kv_cache_memory_bytes", rest),
            ("max_model_len", max(plan.max_model_len // 4, 1)),
            ("max_num_batched_tokens", 4 * plan.max_num_batched_tokens),
            ("max_num_seqs", max(config.max_num_seqs // 4, 1)),
        ]
        found: dict[str, MemoryPlan | str] = {}
        for field, value in tries:
            changed = dataclasses.replace(config, **{field: value})
            try:
                other: MemoryPlan | str = self.plan(changed)
            except CapacityError as error:
                other = str(error)
            except ConfigError:  # the model's vectors or the device's kernels are not for it
                continue
            if other != plan:
                found[f"--{field.replace('_', '-')} {value}"] = other
        return found
