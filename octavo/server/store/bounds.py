"""How much may be stored: bytes and objects, of one tenant and of all.

Made from the options by `Store`, asked in every transaction that adds something. Never stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RESPONSES_SHARE = 4
"""Responses get a quarter of the bytes: many small ones that pass never push out a file."""
MAX_RESPONSES = 100_000
MAX_FILES = 20_000
"""Files and batches together."""


class Pool(StrEnum):
    """Kinds that share a bound."""

    PASSING = "passing"
    """The oldest make room for new ones."""
    KEPT = "kept"
    """What is there stays; what does not fit is refused."""


class Kind(StrEnum):
    """What an object is."""

    RESPONSE = "response"
    FILE = "file"
    BATCH = "batch"

    @property
    def pool(self) -> Pool:
        return Pool.PASSING if self is Kind.RESPONSE else Pool.KEPT


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of objects, and their bytes."""

    count: int
    num_bytes: int

    def fits(self, limit: Amount) -> bool:
        return self.count <= limit.count and self.num_bytes <= limit.num_bytes

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.count + other.count, self.num_bytes + other.num_bytes)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that may be stored."""

    max_bytes: int
    num_tenants: int
    """Where there are several, each gets half at most."""

    def total(self, pool: Pool) -> Amount:
        """Returns the limit of all tenants together."""
        passing = self.max_bytes // RESPONSES_SHARE
        if pool is Pool.PASSING:
            return Amount(MAX_RESPONSES, passing)
        return Amount(MAX_FILES, self.max_bytes - passing)

    def of_tenant(self, pool: Pool) -> Amount:
        """Returns the limit of one tenant."""
        total = self.total(pool)
        if self.num_tenants <= 1:
            return total
        return Amount(total.count // 2, total.num_bytes // 2)
