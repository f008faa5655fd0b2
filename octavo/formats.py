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


WHOLE_VECTOR = 0
"""As `KVFormat.scale_elements`: one scale for a whole vector of a token and head."""
PACKED_BLOCK = 64
"""Numbers of int4 that are packed together, so that vectors are multiples of it: byte i of a block
has number i in its low half and number i + 32 in its high half."""
SCALE_FORMAT, SCALE_BITS = "bfloat16", 16
"""Of the scales: as wide a range as float32, and a step that quantised numbers do not notice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How keys, or values, are stored: the numbers, and what scales they need beside them."""

    name: str
    """Of one number: float32, float16, bfloat16, fp8 (e4m3), int8, int4."""
    bits: int
    scale_elements: int | None = None
    """Numbers of a vector that share a scale; WHOLE_VECTOR; None: there are none."""

    def __post_init__(self) -> None:
        if self.name.startswith("int") and self.scale_elements is None:
            raise ValueError(f"{self.name} numbers mean nothing without scales")

    @property
    def is_quantized(self) -> bool:
        """Whether vectors have scales."""
        return self.scale_elements is not None

    @property
    def is_mixed(self) -> bool:
        """Whether vectors go through a Hadamard matrix before they are rounded."""
        return self.bits < 8

    def num_scales(self, size: int) -> int:
        """Returns how many scales a vector of `size` numbers has."""
        if self.scale_elements is None:
            return 0
        return -(-size // (self.scale_elements or size))

    def vector_bits(self, size: int) -> int:
        """Returns the bits of a vector of `size` numbers, with its scales."""
        return size * self.bits + self.num_scales(size) * SCALE_BITS

    def takes(self, size: int) -> bool:
        """Whether vectors of `size` numbers can be stored."""
        return self.bits >= 8 or size % PACKED_BLOCK == 0


KV_FORMATS: dict[str, KVFormat] = {
    one.name: one
    for one in (
        KVFormat(name="float32", bits=32),
        KVFormat(name="float16", bits=16),
        KVFormat(name="bfloat16", bits=16),
        KVFormat(name="fp8", bits=8, scale_elements=WHOLE_VECTOR),
        KVFormat(name="int8", bits=8, scale_elements=WHOLE_VECTOR),
        KVFormat(name="int4", bits=4, scale_elements=32),
    )
}
_ALIASES = {"fp8_e4m3": "fp8"}


def kv_format(name: str) -> KVFormat:
    """Returns the KV format called `name`. Raises ConfigError with the known names."""
    found = KV_FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        known = ", ".join(KV_FORMATS)
        message = f"kv_cache_dtype {name!r} is unknown; use {known}, or two of them: int8/int4"
        raise ConfigError(message, field="kv_cache_dtype")
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormats:
    """The formats of keys and of values."""

    key: KVFormat
    value: KVFormat

    @property
    def name(self) -> str:
        """As `kv_formats` reads it: "int8", or "int8/int4" where they differ."""
        return "/".join(dict.fromkeys((self.key.name, self.value.name)))

    @property
    def bits(self) -> int:
        """Of a key's and a value's number together."""
        return self.key.bits + self.value.bits


def kv_formats(name: str) -> KVFormats:
    """Returns the formats called "int8", or "int8/int4": of keys and of values. Raises
    ConfigError."""
    key, slash, value = name.partition("/")
    first = kv_format(key)
    return KVFormats(key=first, value=kv_format(value) if slash else first)
