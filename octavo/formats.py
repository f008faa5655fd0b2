"""Number formats of weights and KV cache: names, block shapes, bytes. No torch.

Read by the planner, the loaders and the kernels, so that "how many bytes" has one answer.
GGUF block layouts: ggml's `ggml-common.h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.errors import ConfigError

ScaleKind = Literal["f16", "bf16", "f32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFormat:
    """How one matrix row is stored: blocks of `block_size` elements in `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int
    is_padded: bool = False
    """Whether the last block of a row may be only partly used; it has all its bytes."""
    table_size: int = 0
    """Float32 numbers of the table that blocks point into, which the matrix brings along."""

    @property
    def is_block(self) -> bool:
        """Whether elements share scales, so that rows are bytes rather than numbers."""
        return self.block_size > 1

    @property
    def has_table(self) -> bool:
        return self.table_size > 0

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` elements. Raises ConfigError where blocks do not divide it."""
        if cols % (GROUP if self.is_padded else self.block_size):
            raise ConfigError(
                f"a row of {cols} elements is no multiple of {self.name}'s block of "
                f"{self.block_size}; store this tensor in bf16 or f32 instead"
            )
        return -(-cols // self.block_size) * self.block_bytes


TWICE_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the 16 values of an e2m1 code, as ggml has them; scales are halved for it."""
GROUP = 32
"""Elements that the kernels unpack at a time; blocks are multiples of it, or numbers."""


def int4_format(group: int, scales: ScaleKind) -> WeightFormat:
    """Returns the format of codes 0..15 that mean (code - zero) * scale: a block is its scale, its
    zero (a byte), and for every 32 elements 16 bytes, element i low and i + 16 high in byte i."""
    return _own(f"int4_{group}_{scales}", group, _SCALE_BYTES[scales] + 1 + group // 2)


def int8_format(group: int) -> WeightFormat:
    """Returns the format of codes 0..255 that mean (code - zero) * scale: a block is its float32
    scale, its zero (a byte) and its codes."""
    return _own(f"int8_{group}", group, 5 + group)


def _own(name: str, block_size: int, block_bytes: int) -> WeightFormat:
    return WeightFormat(name=name, block_size=block_size, block_bytes=block_bytes, is_padded=True)


_SCALE_BYTES: dict[ScaleKind, int] = {"f16": 2, "bf16": 2, "f32": 4}
INT_GROUPS = (32, 64, 128)
"""Elements of a row that share a scale; larger groups repeat theirs."""
FP8 = _own("fp8", 128, 132)
"""A float32 scale, then 128 numbers of 8 bits (e4m3) that it multiplies."""
NVFP4 = WeightFormat(name="nvfp4", block_size=64, block_bytes=36, is_padded=True, table_size=256)
"""ggml's: four e4m3 scales, then four times eight bytes; what a scale means is in the table."""


def _table(*rows: tuple[str, int, int]) -> dict[str, WeightFormat]:
    return {n: WeightFormat(name=n, block_size=s, block_bytes=b) for n, s, b in rows}


GGUF_FORMATS: dict[str, WeightFormat] = _table(
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
    ("q2_k", 256, 84),
    ("q3_k", 256, 110),
    ("iq4_nl", 32, 18),
    ("iq4_xs", 256, 136),
    ("mxfp4", 32, 17),
) | {"nvfp4": NVFP4}
GRID_FORMATS: dict[str, WeightFormat] = {
    name: WeightFormat(name=name, block_size=256, block_bytes=size, table_size=entries * width)
    for name, size, entries, width in (
        ("iq2_xxs", 66, 256, 8),
        ("iq2_xs", 74, 512, 8),
        ("iq2_s", 82, 1024, 8),
        ("iq3_xxs", 98, 256, 4),
        ("iq3_s", 110, 512, 4),
        ("iq1_s", 50, 2048, 8),
        ("iq1_m", 56, 2048, 8),
    )
}
"""ggml's whose codes point into a grid of vectors: their table."""
GGUF_FORMATS |= GRID_FORMATS | _table(("tq1_0", 256, 54), ("tq2_0", 256, 66))
PACKED_FORMATS: dict[str, WeightFormat] = {
    one.name: one
    for one in (
        *(int4_format(group, scales) for group in INT_GROUPS for scales in ("f16", "bf16")),
        *(int8_format(group) for group in INT_GROUPS),
        FP8,
    )
}
"""What published codes and scales become in memory: a row's codes beside the scales they need, so
that a product reads one stream. Bit for bit what the published format says."""
WEIGHT_FORMATS = GGUF_FORMATS | PACKED_FORMATS


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
        """Whether all vectors go through a Hadamard matrix before they are rounded."""
        return self.bits < 8

    @property
    def mixes_keys(self) -> bool:
        """Whether keys do, balanced or not (`KeyChange`): steps of equal size want numbers of like
        size. Values would have to come back from it, for less."""
        return self.name.startswith("int")

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
