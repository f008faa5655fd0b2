"""Steps of nobody, before the first request: they build kernels and show what a step takes.

Made for the builder, run by its `Rehearsal`. They live in block 0, which nobody reads, and leave
nothing behind but kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from octavo.request import SamplingParams
from octavo.runner.step_sizes import StepSizes
from octavo.step import MAX_PADDED_TOKENS, Int32, Purpose, RowStart, StepPlan

RUN_ROWS = (1, 8, 32, 128)
"""Batch sizes of decodes, beside the largest, that are run before the first request."""
SHARING_ROWS = 32
SMALLEST_CHUNK = 16
"""Tokens of a prompt's chunk from which on all powers of two are built for."""
DRAWN = SamplingParams(temperature=1.0)
EVERYTHING = SamplingParams(
    temperature=1.0,
    top_k=2,
    repetition_penalty=1.1,
    logit_bias={0: 1.0},
    allowed_token_ids=(0, 1),
)
"""What else the sampler has kernels for."""


def steps_to_run(max_num_seqs: int, max_num_tokens: int, vocab_size: int) -> Iterator[StepPlan]:
    """Yields the largest step, and decodes."""
    yield make_step(1, max_num_tokens, vocab_size)
    for num_rows in sorted({min(rows, max_num_seqs) for rows in (*RUN_ROWS, max_num_seqs)}):
        yield make_step(num_rows, 1, vocab_size)


def without_tokens(steps: Iterable[StepPlan]) -> Iterator[StepPlan]:
    """Yields the steps for a model that has no logits of tokens."""
    for step in steps:
        yield replace(step, purposes=np.full_like(step.purposes, Purpose.NONE))


def steps_to_build(
    max_num_seqs: int, max_num_tokens: int, max_model_len: int, vocab_size: int
) -> Iterator[StepPlan]:
    """Yields a step of every shape whose launches may differ: chunks of all sizes, decodes of all
    sizes, a shared prefix, sampling with all its filters. Those with most new kernels come first.
    """
    yield from steps_to_run(max_num_seqs, max_num_tokens, vocab_size)
    yield make_step(1, 1, vocab_size, params=EVERYTHING)
    sharing = min(SHARING_ROWS, max_num_seqs)
    yield make_step(sharing, 1, vocab_size, num_computed=max_model_len - 1)
    num_tokens = SMALLEST_CHUNK
    while num_tokens < max_num_tokens:
        yield make_step(1, num_tokens, vocab_size)
        num_tokens *= 2
    for num_rows in StepSizes(max_num_seqs).decodes:
        if num_rows < max_num_seqs:
            yield make_step(num_rows, 1, vocab_size)


def steps_to_capture(
    max_num_seqs: int,
    max_num_tokens: int,
    max_model_len: int,
    vocab_size: int,
    max_padded_tokens: int = MAX_PADDED_TOKENS,
) -> Iterator[StepPlan]:
    """Yields a step of every size that is replayed as a graph, whatever attention is bound by
    beside; the largest first, which take most memory."""
    sizes = StepSizes(max_num_seqs, max_padded_tokens)
    for size in reversed(sizes.decodes):
        yield make_step(min(size, max_num_seqs), 1, vocab_size)
    for rows, tokens in reversed(list(sizes.all_mixed())):
        num_rows = min(rows - 1, max_num_seqs)
        num_tokens = min(tokens, max_num_tokens, num_rows * max_model_len)
        step = make_mixed_step(num_rows, num_tokens, vocab_size) if num_tokens > num_rows else None
        if step is not None and sizes.padded(step) == (rows, tokens):
            yield step


def make_mixed_step(num_rows: int, num_tokens: int, vocab_size: int) -> StepPlan:
    """Returns a step of `num_rows` sequences that begin, with about as many tokens each."""
    ends = np.arange(num_rows + 1) * num_tokens // num_rows
    return _step_of(np.diff(ends).astype(np.int32), vocab_size)


def make_step(
    num_rows: int,
    query_len: int,
    vocab_size: int,
    *,
    num_computed: int = 0,
    params: SamplingParams = DRAWN,
) -> StepPlan:
    """Returns a step of `num_rows` sequences with `query_len` tokens each, after `num_computed`."""
    lens = np.full(num_rows, query_len, np.int32)
    return _step_of(lens, vocab_size, num_computed=num_computed, params=params)


def _step_of(
    query_lens: Int32,
    vocab_size: int,
    *,
    num_computed: int = 0,
    params: SamplingParams = DRAWN,
) -> StepPlan:
    rows = np.arange(len(query_lens), dtype=np.int32)
    starts = tuple(
        RowStart(
            row=row,
            params=params,
            seed=row,
            stop_token_ids=(),
            prompt_len=num_computed + query_len,
            token_ids=np.zeros(num_computed + query_len, np.int32),
        )
        for row, query_len in enumerate(query_lens.tolist())
    )
    return StepPlan(
        step_id=1,
        rows=rows,
        starts=np.full_like(rows, num_computed),
        query_lens=query_lens,
        token_ids=np.arange(query_lens.sum(), dtype=np.int32) * 7919 % vocab_size,
        from_device=np.zeros(len(rows), np.bool_),
        purposes=np.full(len(rows), Purpose.TOKEN, np.int8),
        row_starts=starts,
    )
