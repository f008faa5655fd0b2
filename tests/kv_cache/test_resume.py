"""Where a sequence can go on, told token by token."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from octavo.kv_cache.resume import can_resume
from octavo.visibility import Visibility
from tests.visibilities import KIND, sees


@given(KIND, st.lists(st.booleans(), max_size=30), st.integers(1, 8))
def test_a_sequence_can_resume_where_all_that_later_tokens_see_is_known(
    kind: Visibility, known: list[bool], block: int
) -> None:
    found = can_resume(kind, np.array(known, np.bool_), block)
    for n in range(len(known) + 1):
        needed = {
            other // block
            for position in range(n * block, n * block + 2)
            for other in range(n * block)
            if sees(kind, position, other)
        }
        assert found[n] == all(known[one] for one in needed)
