"""Sizes of padded steps: all that come fit one, and all sizes are captured at start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.runner.step_sizes import StepSizes
from octavo.runner.warm_up import make_mixed_step, make_step, steps_to_capture
from octavo.step import MAX_PADDED_PROMPT_TOKENS, MAX_PADDED_TOKENS, StepPlan

VOCAB = 100


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 1500), st.data())
def test_a_small_step_is_padded_to_a_size_that_holds_it(
    max_num_seqs: int, data: st.DataObject
) -> None:
    sizes = StepSizes(max_num_seqs)
    rows = data.draw(st.integers(1, max_num_seqs))
    more = data.draw(st.integers(0, MAX_PADDED_TOKENS))
    plan = make_step(rows, 1, VOCAB)
    lens = plan.query_lens.copy()
    lens[-1] += more
    plan = replace(plan, query_lens=lens, token_ids=np.zeros(lens.sum(), np.int32))
    found = sizes.padded(plan)
    if not more:
        assert found is not None
        assert rows <= found[0] == found[1] <= max(2 * rows, rows + 64)
    elif rows + more <= MAX_PADDED_TOKENS:
        assert found is not None
        assert found in list(sizes.all_mixed())
        assert rows < found[0], "nobody owns the padding"
        assert rows + more <= found[1]
    else:
        assert found is None


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16, 64, 100, 256, 1024])
def test_every_size_is_captured_once(max_num_seqs: int) -> None:
    sizes = StepSizes(max_num_seqs)
    steps = list(steps_to_capture(max_num_seqs, 8192, 4096, VOCAB))
    decodes = [one for one in steps if one.num_rows == one.num_tokens]
    assert [padded(sizes, one) for one in decodes] == [(n, n) for n in reversed(sizes.decodes)]
    mixed = [one for one in steps if one.num_rows < one.num_tokens]
    assert sorted(padded(sizes, one) for one in mixed) == sorted(sizes.all_mixed())
    assert len(mixed) <= 12


def test_longer_steps_of_few_rows_are_padded_where_the_engine_has_them_so() -> None:
    sizes = StepSizes(256, MAX_PADDED_PROMPT_TOKENS)
    steps = list(steps_to_capture(256, 8192, 8192, VOCAB, MAX_PADDED_PROMPT_TOKENS))
    assert {padded(sizes, one) for one in steps} >= set(sizes.all_mixed())
    few, many = make_mixed_step(3, 3000, VOCAB), make_mixed_step(40, 3000, VOCAB)
    assert (sizes.padded(few), sizes.padded(many)) == ((16, 3072), None)
    assert StepSizes(256).padded(few) is None


def test_steps_to_capture_keep_to_what_the_engine_takes() -> None:
    for step in steps_to_capture(8, 300, 50, VOCAB):
        assert step.num_rows <= 8
        assert step.num_tokens <= 300
        assert step.query_lens.max() <= 50


def test_a_mixed_step_has_about_as_many_tokens_in_every_row() -> None:
    step = make_mixed_step(3, 11, VOCAB)
    assert step.query_lens.tolist() == [3, 4, 4]
    assert [start.prompt_len for start in step.row_starts] == [3, 4, 4]
    assert len(step.token_ids) == 11


def padded(sizes: StepSizes, step: StepPlan) -> tuple[int, int]:
    found = sizes.padded(step)
    assert found is not None
    return found
