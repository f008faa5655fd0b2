"""What kernels can compute, for those who plan without loading one: numbers and checks, no torch.

Asked by the registry, the placements and the planners, so that a plan and a load refuse alike.
Never looks at a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NoReturn

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.formats import KV_FORMATS, PACKED_BLOCK, KVFormats, WeightFormat, kv_formats
from octavo.kernels.cells import kept_on_gpus
from octavo.visibility import Chunk, Visibility

TRITON_HEAD_SIZE = 256
CPU_BACKENDS = ("native", "reference")


class AttentionFeature(StrEnum):
    """What layers may want that not every back end has."""

    CHUNKS = "attention in chunks"
    SINKS = "attention sinks"
    UNROTATED = "keys without rotation"
    SOFT_CAPS = "soft caps of scores"
    LATENT = "latent attention"


_SERVED: dict[str, frozenset[AttentionFeature]] = {
    "native": frozenset(AttentionFeature),
    "reference": frozenset(AttentionFeature),
    "triton": frozenset(AttentionFeature),
}


_KV_SERVED: dict[str, frozenset[str]] = {
    "native": frozenset(KV_FORMATS),
    "reference": frozenset(KV_FORMATS),
    "triton": frozenset(KV_FORMATS),
}
"""Formats of keys, and of values."""
_LATENT_SERVED = _KV_SERVED
"""Formats of latent vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWants:
    """What the layers of a model want of a back end's attention."""

    head_sizes: frozenset[int] = frozenset()
    features: frozenset[AttentionFeature] = frozenset()
    vector_sizes: frozenset[int] = frozenset()
    """Of what is kept of a token, where each part has scales of its own."""
    rotated_sizes: frozenset[int] = frozenset()
    """Of the rotated numbers behind latent vectors."""
    kv: KVFormats = kv_formats("float32")

    @staticmethod
    def of_all(wants: Iterable[AttentionWants]) -> AttentionWants:
        """Returns what some layers want together."""
        each = list(wants)
        return AttentionWants(
            head_sizes=frozenset().union(*(one.head_sizes for one in each)),
            features=frozenset().union(*(one.features for one in each)),
            vector_sizes=frozenset().union(*(one.vector_sizes for one in each)),
            rotated_sizes=frozenset().union(*(one.rotated_sizes for one in each)),
        )


def attention_wants(
    *,
    head_size: int,
    visibility: Visibility,
    is_rotated: bool = True,
    has_sinks: bool = False,
    soft_cap: float | None = None,
) -> AttentionWants:
    """Returns what one layer wants: see `octavo.kernels.inputs.AttentionOp`."""
    asked = {
        AttentionFeature.CHUNKS: isinstance(visibility, Chunk),
        AttentionFeature.SINKS: has_sinks,
        AttentionFeature.UNROTATED: not is_rotated,
        AttentionFeature.SOFT_CAPS: soft_cap is not None,
    }
    features = frozenset(feature for feature, is_asked in asked.items() if is_asked)
    sizes = frozenset((head_size,))
    return AttentionWants(head_sizes=sizes, features=features, vector_sizes=sizes)


def attention_unfit(backend: str, wants: AttentionWants) -> str | None:
    """Returns why a back end cannot attend for a model, or None where it can."""
    largest = max(wants.head_sizes, default=0)
    if backend == "triton" and largest > TRITON_HEAD_SIZE:
        return f"heads of {largest} are larger than {TRITON_HEAD_SIZE}"
    missing = wants.features - _SERVED[backend]
    if missing:
        return f"it has no {' and no '.join(sorted(missing))}"
    return _kv_unfit(backend, wants)


def _kv_unfit(backend: str, wants: AttentionWants) -> str | None:
    """Returns why a back end cannot keep keys and values as they are wanted, or None."""
    stored = (wants.kv.key, wants.kv.value)
    for one in stored:
        sizes = [size for size in sorted(wants.vector_sizes) if not one.takes(size)]
        if sizes:
            return f"{one.name} packs {PACKED_BLOCK} numbers, and vectors have {sizes[0]}"
        odd = [size for size in sorted(wants.rotated_sizes) if size & (size - 1)]
        if backend == "triton" and one.is_quantized and odd:
            return f"{one.name} takes a power of two rotated numbers, and there are {odd[0]}"
    if {one.name for one in stored} <= _served_formats(backend, wants):
        return None
    return f"it has no kernel for {wants.kv.name} keys and values"


def _served_formats(backend: str, wants: AttentionWants) -> frozenset[str]:
    if AttentionFeature.LATENT in wants.features:
        return _LATENT_SERVED[backend]
    return _KV_SERVED[backend]


def check_kv_formats(backend: str, device: str, wants: AttentionWants) -> None:
    """Refuses formats of keys and values that no kernel serves. Raises ConfigError with the list of
    those that would be served."""
    asked = ("triton",) if device == "cuda" else CPU_BACKENDS
    asked = (backend,) if backend in asked else asked
    reasons = {name: _kv_unfit(name, wants) for name in asked}
    if None in reasons.values():
        return
    fitting = [
        name
        for name in KV_FORMATS
        if any(_kv_unfit(one, replace(wants, kv=kv_formats(name))) is None for one in asked)
    ]
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise ConfigError(
        f"kv_cache_dtype {wants.kv.name} is served by no kernel of this model on {device} ({why}); "
        f"use {', '.join(fitting)}",
        field="kv_cache_dtype",
    )


def check_activations(
    activation_dtype: str, backend: str, device: str, *, is_packed: bool, num_ranks: int
) -> None:
    """Refuses rounding activations where no kernel does: only packed weights are multiplied so, by
    a CPU's native kernels, and ranks of a CPU unpack theirs. Raises ConfigError."""
    if activation_dtype == "auto":
        return
    if device != "cpu" or backend not in ("auto", "native"):
        reason = f"the device is {device}, attention_backend {backend}"
        way_out = "--device cpu and attention_backend auto"
    elif num_ranks > 1:
        reason, way_out = f"{num_ranks} ranks share the weights unpacked", "tensor_parallel_size 1"
    elif not is_packed:
        reason = "the model's weights are plain numbers"
        way_out = "a GGUF file in 4 to 8 bits, or quantization int8 or int4"
    else:
        return
    raise ConfigError(
        f"activation_dtype {activation_dtype} is served by the native kernels of a CPU for packed "
        f"weights alone, and {reason}; use auto, or {way_out}",
        field="activation_dtype",
    )


def check_copied_format(
    name: str, number_format: WeightFormat, device: str, *, keeps_packed: bool
) -> None:
    """Refuses a matrix in a format that cannot be copied to a device: a GPU (`keeps_packed`) has
    those of `cells`, ranks of a CPU numbers alone. Raises UnsupportedModelError naming the
    matrix, what is known and the way out."""
    if number_format.is_block and not (keeps_packed and number_format.name in kept_on_gpus()):
        known = f"; it keeps {', '.join(kept_on_gpus())} packed" if keeps_packed else ""
        refuse_packed(f"{name} is in the block format {number_format.name}", device, known)


def refuse_packed(what: str, device: str, known: str = "") -> NoReturn:
    """Raises UnsupportedModelError: a device, or a rank of several, multiplies numbers alone."""
    raise UnsupportedModelError(
        f"{what}, which {device} cannot multiply by yet{known}; unpack it with --dtype bfloat16, "
        "or run it with --device cpu (and one process)"
    )


def check_backend(backend: str, device: str, wants: AttentionWants) -> None:
    """Refuses what no back end of the device, or not the named one, can do. Raises ConfigError."""
    if device == "cuda" and backend in CPU_BACKENDS:
        raise ConfigError(
            f"attention_backend {backend} computes on the CPU, and the device is {device}; use "
            "auto or triton",
            field="attention_backend",
        )
    if device == "cuda":
        reason = attention_unfit("triton", wants)
        if reason is not None:
            raise ConfigError(
                f"{device} cannot compute this model's attention: {reason}; use --device cpu",
                field="device",
            )
    elif backend in CPU_BACKENDS:
        reason = attention_unfit(backend, wants)
        if reason is not None:
            fitting = [name for name in CPU_BACKENDS if attention_unfit(name, wants) is None]
            raise ConfigError(
                f"attention_backend {backend} cannot compute this model's attention: {reason}; use "
                f"{' or '.join(('auto', *fitting))}",
                field="attention_backend",
            )
