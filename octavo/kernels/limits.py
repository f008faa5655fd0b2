"""What kernels can compute, for those who plan without loading one: numbers and checks, no torch.

Asked by the registry, the placements and the planners, so that a plan and a load refuse alike.
Never looks at a device.
"""

from __future__ import annotations

from octavo.errors import ConfigError, UnsupportedModelError
from octavo.formats import WeightFormat

TRITON_HEAD_SIZE = 256
CPU_BACKENDS = ("native", "reference")


def check_copied_format(name: str, number_format: WeightFormat, device: str) -> None:
    """Refuses a matrix in a format that cannot be copied to a device, which multiplies numbers
    alone. Raises UnsupportedModelError naming the matrix and the way out."""
    if number_format.is_block:
        raise UnsupportedModelError(
            f"{name} is in the block format {number_format.name}, which {device} cannot multiply "
            "by yet; convert with --dtype bfloat16, or run it with --device cpu (and one process)"
        )


def check_backend(backend: str, device: str, head_sizes: frozenset[int]) -> None:
    """Refuses a GPU with what only the CPU's back ends can do. Raises ConfigError."""
    if device != "cuda":
        return
    if backend in CPU_BACKENDS:
        raise ConfigError(
            f"attention_backend {backend} computes on the CPU, and the device is {device}; use "
            "auto or triton",
            field="attention_backend",
        )
    largest = max(head_sizes, default=0)
    if largest > TRITON_HEAD_SIZE:
        raise ConfigError(
            f"heads of {largest} are larger than the {TRITON_HEAD_SIZE} that {device} can compute; "
            "use --device cpu",
            field="device",
        )
