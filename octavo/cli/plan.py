"""`octavo plan`: what goes where in memory and what fits, before anything is loaded.

Called by the command line. Reads the config (and the header of a GGUF file), never a weight; the
plan itself is the engine's own (`engine.memory`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.cli.options import Subparsers, add_options, engine_config, parse_size
from octavo.cli.serve import add_model
from octavo.config import EngineConfig
from octavo.device import DeviceMemory, select_device
from octavo.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    from octavo.kv_cache.planner import MemoryPlan
    from octavo.models.family import Family
    from octavo.models.spec import ModelSpec
    from octavo.weights.gguf_file import GGUFFile
    from octavo.weights.hub import ModelFiles
    from octavo.weights.quantization import LoadQuantization

HELP = "show weights, KV cache and what fits, from the config alone"
EXAMPLES = """examples:
  octavo plan demo-moe                                     on this machine
  octavo plan MODEL --device cuda --memory 80GiB           on a GPU of 80 GiB, here or not
  octavo plan MODEL --device cuda --memory 80GiB --tensor-parallel-size 2"""
LENGTHS = (1024, 4096, 16384, 65536, 131072)
PART_NAMES: tuple[str, ...] = (
    "embeddings",
    "attention",
    "dense MLPs",
    "experts",
    "shared experts",
    "rest",
)
_GGUF_PARTS = (
    (r"(token_embd|output)\.", "embeddings"),
    (r"blk\.\d+\.attn_(?!norm)", "attention"),
    (r"blk\.\d+\.ffn_\w+_shexp", "shared experts"),
    (r"blk\.\d+\.ffn_(gate|up|down)(_exps|\.\d+)\.", "experts"),
    (r"blk\.\d+\.ffn_(gate|up|down)\.weight", "dense MLPs"),
)


def add_parser(subparsers: Subparsers) -> None:
    """Adds `plan`."""
    parser = subparsers.add_parser("plan", help=HELP, description=HELP, epilog=EXAMPLES)
    add_model(parser)
    add = parser.add_argument
    add(
        "--memory",
        "--gpu-memory",
        dest="memory",
        type=parse_size,
        metavar="SIZE",
        help="plan for this much free memory, like 80GiB (default: this machine's); with --device "
        "cuda for a card of that size, which need not be here",
    )
    add(
        "--lengths",
        type=_parse_numbers,
        default=LENGTHS,
        metavar="N,N",
        help="say how many requests of these lengths fit",
    )
    add("--json", action="store_true", help="print one JSON object")
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises CapacityError, after what is known, if the model does not fit."""
    config = engine_config(args)
    spec, family, files = read_model(config)
    device, memory = _device(config.device, args.memory)
    planner = _Planner(spec, family, files, device, memory)
    parts = planner.parts(config)
    if not args.json:
        print(_parts_text(config.model, spec, parts))
    plan = planner.plan(config)
    changes = planner.changes(config, plan)
    if args.json:
        print(json.dumps(_as_json(spec, parts, plan, changes, args.lengths)))
    else:
        print(_device_text(device, args.memory))
        print(_plan_text(plan, args.lengths))
        print(_changes_text(changes))
    return 0


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


class _Planner:
    """Plans one model under different options."""

    def __init__(
        self,
        spec: ModelSpec,
        family: Family,
        files: ModelFiles,
        device: str,
        memory: DeviceMemory,
    ) -> None:
        self._spec = spec
        self._family = family
        self._path = path = files.path
        self._hf_config = files.config
        self._device = device
        self._memory = memory
        self._file = _read_gguf(path) if path.suffix == ".gguf" else None
        self._quantization = files.quantization

    def parts(self, config: EngineConfig) -> dict[str, int]:
        """Returns the bytes of the weights by part of the model."""
        from octavo.engine.memory import weights_dtype
        from octavo.weights.quantization import LOAD_QUANTIZATIONS

        if config.dtype == "auto" and self._file is not None:
            return gguf_parts(self._file)
        if config.dtype == "auto" and self._quantization is not None:
            return packed_parts(self._spec, self._family, self._path)
        number_bytes = 4 if weights_dtype(config, self._hf_config) == "float32" else 2
        made = LOAD_QUANTIZATIONS.get(config.quantization or "")
        if made is not None and self._quantization is None:
            return made_parts(self._spec, self._family, number_bytes, made)
        return spec_parts(self._spec, number_bytes)

    def plan(self, config: EngineConfig) -> MemoryPlan:
        from octavo.engine.memory import plan_model, weights_dtype

        self._check_formats(config)
        return plan_model(
            self._spec,
            weights_bytes=sum(self.parts(config).values()),
            dtype=weights_dtype(config, self._hf_config),
            config=config,
            device=self._device,
            memory=self._memory,
        )

    def _check_formats(self, config: EngineConfig) -> None:
        """Refuses what the loader would: weights that stay in a file's blocks, where they have to
        be copied. Raises UnsupportedModelError."""
        from octavo.kernels.limits import check_copied_format, refuse_packed
        from octavo.weights.quantization import check_kv_cache, check_quantization
        from octavo.weights.sizes import has_nvfp4

        check_quantization(config.quantization, self._quantization)
        check_kv_cache(config.kv_cache_dtype, self._quantization)
        is_copied = self._device == "cuda" or config.tensor_parallel_size > 1
        keeps_packed = self._device == "cuda"
        is_packed = self._quantization is not None and config.dtype == "auto" and is_copied
        if is_packed and (not keeps_packed or has_nvfp4(self._path)):
            assert self._quantization is not None
            refuse_packed(f"the model is quantised with {self._quantization.method}", self._device)
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


def _device(name: str, size: int | None) -> tuple[str, DeviceMemory]:
    """Returns the name and the memory of the device to plan for: of one with `size` bytes, all of
    them free, if that is given, else of this machine's."""
    if size is None:
        device = select_device(name)
        return device.name, device.memory()
    name = select_device(name).name if name == "auto" else name
    return name, DeviceMemory(total_bytes=size, available_bytes=size)


def _device_text(device: str, size: int | None) -> str:
    """Says which device is planned for, and how to plan for another."""
    here = "this machine's" if size is None else f"one with {_size(size)} of memory"
    other = "" if device != "cpu" else f"; --device cuda --memory {_other_size(size)} plans a GPU"
    return f"device: {device}, {here}{other}"


def _other_size(size: int | None) -> str:
    return "80GiB" if size is None else f"{size / 2**30:g}GiB"


def spec_parts(spec: ModelSpec, element_bytes: int) -> dict[str, int]:
    """Returns the bytes of every part when each number takes `element_bytes`."""
    parts = dict.fromkeys(PART_NAMES, 0)
    for parameter, shape in spec.parameters():
        parts[_part_of(parameter.name)] += math.prod(shape) * element_bytes
    return parts


def made_parts(
    spec: ModelSpec, family: Family, number_bytes: int, made: LoadQuantization
) -> dict[str, int]:
    """Returns the bytes of every part when weights are quantised as they are loaded."""
    from octavo.weights.quantization import LOAD_FORMATS, is_quantized_at_load

    parts = dict.fromkeys(PART_NAMES, 0)
    for parameter, shape in spec.parameters():
        row_bytes = shape[-1] * number_bytes
        if is_quantized_at_load(family.weight_name(parameter), shape):
            row_bytes = LOAD_FORMATS[made].row_bytes(shape[-1])
        parts[_part_of(parameter.name)] += math.prod(shape[:-1]) * row_bytes
    return parts


def _read_gguf(path: Path) -> GGUFFile:
    from octavo.weights.gguf_file import read_gguf

    return read_gguf(path)


def gguf_parts(file: GGUFFile) -> dict[str, int]:
    """Returns the bytes of every part as a GGUF file stores it, from its header."""
    parts = dict.fromkeys(PART_NAMES, 0)
    for name, tensor in file.tensors.items():
        part = next((part for pattern, part in _GGUF_PARTS if re.match(pattern, name)), "rest")
        *rows, cols = tensor.shape
        parts[part] += math.prod(rows) * tensor.format.row_bytes(cols)
    return parts


def packed_parts(spec: ModelSpec, family: Family, folder: Path) -> dict[str, int]:
    """Returns the bytes of every part as a quantised checkpoint stores it, from its headers."""
    from octavo.errors import UnsupportedModelError
    from octavo.weights.names import text_name
    from octavo.weights.sizes import stored_bytes

    stored = stored_bytes(folder)
    if not stored:
        raise UnsupportedModelError(
            "how large a quantised model is stands in the headers of its weights, and they are not "
            "here: download it first, or plan it unpacked with --dtype bfloat16"
        )
    part_of = {family.weight_name(one): _part_of(one.name) for one, _ in spec.parameters()}
    parts = dict.fromkeys(PART_NAMES, 0)
    for name, size in stored.items():
        plain = text_name(name)
        other = "experts" if ".experts." in plain else "rest"
        module = plain.rpartition(".")[0]
        parts[part_of.get(plain) or part_of.get(f"{module}.weight", other)] += size
    return parts


def _part_of(name: str) -> str:
    if name in ("embedding", "lm_head"):
        return "embeddings"
    if name.startswith("expert_"):
        return "experts"
    if name.startswith("shared_"):
        return "shared experts"
    if name in ("gate", "up", "down"):
        return "dense MLPs"
    if name in ("attention_norm", "mlp_norm", "final_norm", "router"):
        return "rest"
    return "attention"


def _parse_numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(n) if n.strip().isdigit() else 0 for n in text.split(","))
    if not all(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths; write it like 1024,8192")
    return numbers


def _size(size: int) -> str:
    from octavo.kv_cache.plan_text import gib

    return gib(size) if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _parts_text(model: str, spec: ModelSpec, parts: dict[str, int]) -> str:
    head = (
        f"{model}: {spec.num_parameters / 1e6:,.1f} M parameters, {len(spec.layers)} layers, "
        f"{spec.max_position_embeddings:,} positions"
    )
    if spec.moe_layers:
        head += f", {len(spec.moe_layers)} with up to {spec.max_experts} experts"
    rows = [f"  {name:<16}{_size(size):>12}" for name, size in parts.items() if size]
    return "\n".join([head, "weights:", *rows, f"  {'all':<16}{_size(sum(parts.values())):>12}"])


def _plan_text(plan: MemoryPlan, lengths: tuple[int, ...]) -> str:
    from octavo.kv_cache.plan_text import describe, describe_groups

    lines = [describe(plan), describe_groups(plan)]
    fitting = [n for n in lengths if n <= plan.max_model_len]
    if fitting:
        limit = f"--max-num-seqs {plan.max_num_seqs:,} lets no more run"
        lines.append(f"requests that run side by side, sharing nothing ({limit}):")
        lines += [f"  {n:>9,} tokens  {plan.num_requests(n):>9,}" for n in fitting]
    return "\n".join(lines)


def _changes_text(changes: Mapping[str, MemoryPlan | str]) -> str:
    head = f"  {'with':<40}{'weights':>11}{'activations':>12}{'KV cache':>11}"
    lines = ["what would change:", f"{head}{'KiB/token':>11}{'tokens':>11}{'context':>10}"]
    for option, plan in changes.items():
        if isinstance(plan, str):
            lines.append(f"  {option:<40} does not fit")
            continue
        sizes = (plan.weights_bytes, plan.activation_bytes, plan.kv_bytes)
        lines.append(
            f"  {option:<40}{_size(sizes[0]):>11}{_size(sizes[1]):>12}{_size(sizes[2]):>11}"
            f"{plan.kv_token_bytes / 1024:>11.1f}{plan.num_tokens:>11,}{plan.max_model_len:>10,}"
        )
    return "\n".join(lines)


def _as_json(
    spec: ModelSpec,
    parts: dict[str, int],
    plan: MemoryPlan,
    changes: Mapping[str, MemoryPlan | str],
    lengths: tuple[int, ...],
) -> dict[str, Any]:
    return {
        "num_parameters": spec.num_parameters,
        "weights_parts_bytes": parts,
        **_numbers(plan),
        "groups": [
            {
                "layers": list(group.layers),
                "sees": str(group.spec.visibility),
                "formats": group.spec.formats,
                "page_bytes": group.page_bytes(plan.block_size),
            }
            for group in plan.groups
        ],
        "num_requests": {str(n): plan.num_requests(n) for n in lengths if n <= plan.max_model_len},
        "changes": {
            option: other if isinstance(other, str) else _numbers(other)
            for option, other in changes.items()
        },
    }


def _numbers(plan: MemoryPlan) -> dict[str, int]:
    names = (
        "available_bytes",
        "usable_bytes",
        "weights_bytes",
        "activation_bytes",
        "graph_bytes",
        "other_bytes",
        "kv_bytes",
        "kv_token_bytes",
        "block_bytes",
        "num_blocks",
        "num_tokens",
        "max_model_len",
        "max_num_batched_tokens",
    )
    return {name: getattr(plan, name) for name in names}
