"""A GPU by what its driver would tell of it."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass
class Probe:
    """A GPU of 80 GiB with 10 in use, 6 of them by torch in this process."""

    wanted: str | None = "13.0"
    driver: int = 13000
    usable: bool = True
    devices: int = 1
    listed: str = ""

    def wanted_version(self) -> str | None:
        return self.wanted

    def driver_version(self) -> int:
        return self.driver

    def is_usable(self) -> bool:
        return self.usable

    def num_devices(self) -> int:
        return self.devices

    def memory(self, index: int) -> tuple[int, int]:
        return 70 * GIB, 80 * GIB

    def own_bytes(self, index: int) -> int:
        return 6 * GIB

    def processes(self, index: int) -> str:
        return self.listed
