"""What is under way of a step, and how its results are joined.

Made by the model runner at launch, read when the step is collected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from octavo.models.pooler import Pooler
from octavo.runner.input_batch import StepInputs
from octavo.runner.transfer import Download
from octavo.step import Float32, Purpose, StepPlan, StepResult, TokenLogprobs, single_starts


@dataclass(frozen=True, slots=True)
class Samples:
    """What some of a step's sampling rows have drawn, on its way to the host."""

    places: NDArray[np.int64]
    """Those rows among the sampling ones of their part."""
    download: Download
    logprobs: dict[int, TokenLogprobs]
    """By index into `places`."""


@dataclass(slots=True, kw_only=True)
class Part:
    """A launched step, or a part of one that was too large."""

    plan: StepPlan
    inputs: StepInputs
    samples: list[Samples]
    masked: NDArray[np.int64]
    """Sampling rows that wait for their masks."""
    masked_logits_MV: Tensor | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]
    states: Download | None = None
    """float32 [rows for a vector, M]: the hidden states that vectors are made of."""


@dataclass(frozen=True, slots=True)
class Launched:
    """A whole step."""

    parts: Sequence[Part]
    counts: Download | None
    """Of experts, where they are read after this step."""


def joined(plan: StepPlan, parts: Sequence[Part], pooler: Pooler | None = None) -> StepResult:
    """Waits for a step's tokens and returns the results of its parts as those of the whole;
    `pooler` makes vectors of hidden states."""
    index_of: dict[int, int] = {}
    if any(part.prompt_logprobs or part.states is not None for part in parts):
        index_of = {row: index for index, row in enumerate(plan.rows.tolist())}
    tokens: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    logprobs: dict[int, TokenLogprobs] = {}
    prompts: dict[int, tuple[TokenLogprobs, ...]] = {}
    vectors: dict[int, Float32] = {}
    num_samples = 0
    for part in parts:
        token_ids = np.zeros(len(part.inputs.sampling_rows), np.int32)
        for some in part.samples:
            (token_ids[some.places],) = some.download.wait()
            for index, found in some.logprobs.items():
                logprobs[num_samples + int(some.places[index])] = found
        tokens.append(token_ids)
        num_samples += len(token_ids)
        for index, found in part.prompt_logprobs.items():
            whole = index_of[int(part.plan.rows[index])]
            prompts[whole] = prompts.get(whole, ()) + found
        if part.states is not None:
            assert pooler is not None
            rows = part.plan.rows[part.plan.purposes == Purpose.VECTOR].tolist()
            for row, state_M in zip(rows, part.states.wait()[0], strict=True):
                vectors[index_of[row]] = pooler.vector(state_M)
    return StepResult(
        step_id=plan.step_id,
        token_ids=np.concatenate(tokens),
        token_starts=single_starts(plan.purposes),
        logprobs=logprobs,
        prompt_logprobs=prompts,
        vectors=vectors,
        num_splits=max(0, len(parts) - 1),
    )
