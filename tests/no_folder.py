"""A folder that cannot be."""

from __future__ import annotations

NOWHERE = "/proc/nope"
"""Nobody can make a folder there, not even root."""
