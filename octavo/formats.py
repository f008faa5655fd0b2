"""Number formats of weights and KV cache: names, block shapes, bytes. No torch.

Read by the planner, the loaders and the kernels, so that "how many bytes" has one answer.
GGUF block layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How one matrix row is stored: blocks of `block_size` elements in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int

    @property
    def is_block(self) -> bool:
        """Whether elements share scales, so that rows are bytes rather than numbers."""
        return self.block_size > 1

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` elements; `cols` must be a multiple of the block size."""
        if cols % self.block_size:
            raise ConfigError(
                f"a row of {cols} elements is no multiple of {self.name}'s block of "
                f"{self.block_size}; store this tensor in bf16 or f32 instead"
            )
        return cols // self.block_size * self.block_bytes


def _table(*rows: tuple[str, int, int]) -> dict[str, WeightFormat]:
    return {n: WeightFormat(name=n, block_size=s, block_bytes=b) for n, s, b in rows}


WEIGHT_FORMATS: dict[str, WeightFormat] = _table(
    ("f32", 1, 4),
    ("f16", 1, 2),
    ("bf16", 1, 2),
    ("q8_0", 32, 34),
    ("q4_0", 32, 18),
    ("q4_1", 32, 20),
    ("q5_0", 32, 22),
    ("q5_1", 32, 24),
    ("q4_k", 256, 144),
    ("q5_k", 256, 176),
    ("q6_k", 256, 210),
)


WHOLE_HEAD = 0
"""As `KVFormat.scale_elements`: one scale for a whole vector of a token and head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How keys, or values, are stored: the numbers, and what scales they need beside them."""

    name: str
    """Of one number: float32, float16, bfloat16, fp8 (e4m3), int8, int4."""
    bits: int
    scale_elements: int | None = None
    """Numbers of a head's vector that share a float16 scale; WHOLE_HEAD; None: there are none."""

    def __post_init__(self) -> None:
        if self.name.startswith("int") and self.scale_elements is None:
            raise ValueError(f"{self.name} numbers mean nothing without scales")

    def num_scales(self, head_size: int) -> int:
        """Returns how many scales a vector of `head_size` numbers has."""
        if self.scale_elements is None:
            return 0
        return -(-head_size // (self.scale_elements or head_size))


KV_FORMATS: dict[str, KVFormat] = {
    name: KVFormat(name=name, bits=bits)
    for name, bits in (("float32", 32), ("float16", 16), ("bfloat16", 16))
}


def kv_format(name: str) -> KVFormat:
    """Returns the KV format called `name`. Raises ConfigError with the known names."""
    found = KV_FORMATS.get(name)
    if found is None:
        known = ", ".join(KV_FORMATS)
        message = f"kv_cache_dtype {name!r} is unknown; use {known}"
        raise ConfigError(message, field="kv_cache_dtype")
    return found
