"""A step that was launched before a failure was known never runs."""

from __future__ import annotations

import pytest

from octavo.errors import OctavoError
from octavo.runner.fence import Fence


def run(fence: Fence, generation: int, *, raises: bool = False) -> None:
    with fence.guard(generation):
        if raises:
            raise ValueError("a fault")


def test_steps_behind_one_that_raised_are_dropped_until_its_failure_is_collected():
    fence = Fence()
    first, behind = fence.generation, fence.generation
    with pytest.raises(ValueError, match="a fault"):
        run(fence, first, raises=True)
    with pytest.raises(OctavoError, match="dropped"):
        run(fence, behind)
    fence.collect(first)
    run(fence, fence.generation)


def test_a_dropped_step_that_is_collected_late_does_not_hide_a_newer_failure():
    fence = Fence()
    first, behind = fence.generation, fence.generation
    for generation, error in ((first, ValueError), (behind, OctavoError)):
        with pytest.raises(error):
            run(fence, generation, raises=True)
    fence.collect(first)
    newer, behind_newer = fence.generation, fence.generation
    with pytest.raises(ValueError, match="a fault"):
        run(fence, newer, raises=True)
    fence.collect(behind)
    assert fence.generation == behind_newer
    with pytest.raises(OctavoError, match="dropped"):
        run(fence, fence.generation)
