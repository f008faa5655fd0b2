"""Lists of objects as OpenAI's API answers them, page by page.

Called by the routes that list. Never reads a store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def listed(objects: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """Returns one page; `has_more` tells whether others follow behind its last object."""
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }
