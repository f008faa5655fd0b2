"""What kernels can compute, for those who plan without loading one: numbers and checks, no torch.

Asked by the registry, the placements and the planners, so that a plan and a load refuse alike.
Never looks at a device.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.formats import WeightFormat
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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWants:
    """What the layers of a model want of a back end's attention."""

    head_sizes: frozenset[int] = frozenset()
    features: frozenset[AttentionFeature] = frozenset()

    @staticmethod
    def of_all(wants: Iterable[AttentionWants]) -> AttentionWants:
        """Returns what some layers want together."""
        each = list(wants)
        return AttentionWants(
            head_sizes=frozenset().union(*(one.head_sizes for one in each)),
            features=frozenset().union(*(one.features for one in each)),
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
    return AttentionWants(head_sizes=frozenset((head_size,)), features=features)


def attention_unfit(backend: str, wants: AttentionWants) -> str | None:
    """Returns why a back end cannot attend for a model, or None where it can."""
    largest = max(wants.head_sizes, default=0)
    if backend == "triton" and largest > TRITON_HEAD_SIZE:
        return f"heads of {largest} are larger than {TRITON_HEAD_SIZE}"
    missing = wants.features - _SERVED[backend]
    return f"it has no {' and no '.join(sorted(missing))}" if missing else None


def check_copied_format(name: str, number_format: WeightFormat, device: str) -> None:
    """Refuses a matrix in a format that cannot be copied to a device, which multiplies numbers
    alone. Raises UnsupportedModelError naming the matrix and the way out."""
    if number_format.is_block:
        raise UnsupportedModelError(
            f"{name} is in the block format {number_format.name}, which {device} cannot multiply "
            "by yet; convert with --dtype bfloat16, or run it with --device cpu (and one process)"
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
