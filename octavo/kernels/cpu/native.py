"""Loads the compiled CPU kernels and offers them as ops."""

from __future__ import annotations

from octavo.kernels.reference import ReferenceOps


def unfit_reason() -> str | None:
    """Returns why the native kernels cannot run here, or None."""
    return "the extension octavo/kernels/cpu/_native is not built"


class NativeOps(ReferenceOps):
    """Placeholder until the extension lands; `unfit_reason` keeps it from being chosen."""
