"""A scheduler made by hand: drives a runner with plans that a test spells out.

Blocks lie at random physical ids and are poisoned before they are used and when a window has
passed them, so that a read of the wrong memory shows as NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from octavo.formats import kv_formats
from octavo.kernels.cpu.native import NativeOps
from octavo.kernels.planning import StepAttention, Unplanned
from octavo.kv_cache.spec import group_layers
from octavo.kv_cache.storage import KVStorage
from octavo.models.decoder import Decoder
from octavo.request import SamplingParams
from octavo.runner.equipment import Equipment, StepForward
from octavo.runner.host import host_equipment
from octavo.runner.input_batch import StepInputs
from octavo.runner.model_runner import ModelRunner
from octavo.runner.sampler import Sampler
from octavo.step import (
    Page,
    PageCopy,
    Purpose,
    RowStart,
    StepPlan,
    StepResult,
    TableDelta,
)
from tests.runner.deltas import row_delta

GREEDY = SamplingParams(temperature=0.0)
BLOCK_SIZE = 16


class RecordingForward:
    """Keeps the logits of every token of every step, by step id and in parts."""

    def __init__(self, inner: StepForward, decoder: Decoder) -> None:
        self.inner, self.decoder = inner, decoder
        self.logits: dict[int, list[Tensor]] = {}

    def apply(self, deltas: Sequence[TableDelta]) -> None:
        self.inner.apply(deltas)

    def run(self, plan: StepPlan, inputs: StepInputs, attention: StepAttention) -> Tensor:
        hidden_TM = self.inner.run(plan, inputs, attention)
        logits_TV = self.decoder.logits(hidden_TM[: plan.num_tokens]).clone()
        self.logits.setdefault(plan.step_id, []).append(logits_TV)
        return hidden_TM


@dataclass(eq=False)
class Tracked:
    """One sequence as the driver knows it."""

    row: int
    prompt_len: int
    tokens: list[int]
    params: SamplingParams
    blocks: list[list[int]]
    """By KV group; 0 where the window has passed."""
    num_computed: int = 0
    num_pending: int = 0
    """Tokens sampled by steps not yet collected."""
    started: bool = False
    wants_vector: bool = False
    logits: list[Tensor] = field(default_factory=list)

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.prompt_len :]


class Driver:
    """Owns a runner and its blocks. Use as a context manager."""

    device = torch.device("cpu")

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int = 96,
        max_num_seqs: int = 8,
        max_model_len: int = 256,
        kv_format: str = "float32",
        seed: int = 0,
    ) -> None:
        self.groups = group_layers(decoder.spec.kv_specs(kv_formats(kv_format)))
        storage = KVStorage(self.groups, num_blocks, BLOCK_SIZE, self.device)
        storage.poison([Page(0, block) for block in range(num_blocks)])
        equipment = self.make_equipment(decoder, storage, max_num_seqs, max_model_len)
        self.recording = RecordingForward(equipment.forward, decoder)
        equipment = replace(equipment, forward=self.recording)
        self.runner = ModelRunner(decoder, storage, equipment, poison_freed_blocks=True)
        order = np.random.default_rng(seed).permutation(np.arange(1, num_blocks))
        self.free_blocks: list[int] = order.tolist()
        self.free_rows = list(range(max_num_seqs))
        self.step_id = 0
        self._freed_rows: list[int] = []
        self._freed_blocks: list[int] = []
        self._copies: list[tuple[int, int]] = []

    def make_equipment(
        self, decoder: Decoder, storage: KVStorage, max_num_seqs: int, max_model_len: int
    ) -> Equipment:
        sampler = Sampler(decoder.spec.vocab_size, max_num_seqs)
        recorder = decoder.ops if isinstance(decoder.ops, NativeOps) else None
        return host_equipment(decoder, storage, Unplanned(), sampler, max_model_len, recorder)

    def wait(self) -> None:
        """Waits for what comes after the tokens of the steps collected so far."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()

    def add(
        self,
        tokens: Iterable[int],
        params: SamplingParams = GREEDY,
        *,
        wants_vector: bool = False,
    ) -> Tracked:
        """Gives a row to a new sequence."""
        known = list(tokens)
        row = self.free_rows.pop()
        blocks: list[list[int]] = [[] for _ in self.groups]
        return Tracked(row, len(known), known, params, blocks, wants_vector=wants_vector)

    def free(self, sequence: Tracked) -> None:
        """Takes row and blocks away; the runner hears of it with the next plan."""
        self._freed_rows.append(sequence.row)
        self.free_rows.append(sequence.row)
        for blocks in sequence.blocks:
            self._release(blocks, 0, len(blocks))

    def fork(self, parent: Tracked) -> Tracked:
        """Returns a copy of a sequence: whole blocks shared, the last one copied on write."""
        child = self.add(parent.tokens, parent.params)
        child.prompt_len, child.num_computed = parent.prompt_len, parent.num_computed
        child.logits = list(parent.logits)
        child.blocks = [list(blocks) for blocks in parent.blocks]
        for blocks in child.blocks:
            source = blocks[-1]
            blocks[-1] = self.free_blocks.pop()
            self._copies.append((source, blocks[-1]))
        return child

    def launch(self, chunks: Sequence[tuple[Tracked, int]]) -> tuple[Any, object]:
        """Launches a step that computes `count` tokens of each sequence."""
        deltas: list[TableDelta] = []
        row_starts: list[RowStart] = []
        token_ids: list[int] = []
        purposes: list[Purpose] = []
        for sequence, count in chunks:
            stop = sequence.num_computed + count
            deltas += self._grow(sequence, stop)
            if not sequence.started:
                row_starts.append(self._row_start(sequence))
            known = sequence.tokens[sequence.num_computed : stop]
            token_ids += known or [0]
            is_last = stop == len(sequence.tokens) + sequence.num_pending
            wanted = Purpose.VECTOR if sequence.wants_vector else Purpose.TOKEN
            purposes.append(wanted if is_last else Purpose.NONE)
        plan = StepPlan(
            step_id=self.step_id,
            rows=np.array([s.row for s, _ in chunks], np.int32),
            starts=np.array([s.num_computed for s, _ in chunks], np.int32),
            query_lens=np.array([count for _, count in chunks], np.int32),
            token_ids=np.array(token_ids, np.int32),
            from_device=np.array([s.num_computed >= len(s.tokens) for s, _ in chunks]),
            purposes=np.array(purposes, np.int8),
            row_starts=tuple(row_starts),
            freed_rows=tuple(self._freed_rows),
            freed_pages=tuple(Page(0, block) for block in self._freed_blocks),
            copies=tuple(PageCopy(0, *pair) for pair in self._copies),
            table_deltas=tuple(deltas),
        )
        for pending in (self._freed_rows, self._freed_blocks, self._copies):
            pending.clear()
        self.step_id += 1
        for (sequence, count), purpose in zip(chunks, purposes, strict=True):
            sequence.num_computed += count
            sequence.num_pending += purpose is Purpose.TOKEN
            self._pass_windows(sequence)
        self.recording.logits.pop(plan.step_id, None)  # of a rehearsal, or a launch that raised
        return (plan, list(chunks)), self.runner.launch(plan)

    def collect(self, launched: tuple[Any, object]) -> StepResult:
        """Waits for a launched step and appends what it sampled."""
        (plan, chunks), ticket = launched
        result = self.runner.collect(ticket)
        self.wait()
        logits_TV = torch.cat([part.cpu() for part in self.recording.logits.pop(plan.step_id)])
        sampled = iter(result.token_ids.tolist())
        for (sequence, count), part, is_sampled in zip(
            chunks, logits_TV.split(plan.query_lens.tolist()), plan.samples, strict=True
        ):
            assert len(part) == count
            sequence.logits += list(part)
            if is_sampled:
                sequence.tokens.append(next(sampled))
                sequence.num_pending -= 1
        return result

    def step(self, chunks: Sequence[tuple[Tracked, int]]) -> StepResult:
        return self.collect(self.launch(chunks))

    def decode(self, sequences: Sequence[Tracked], count: int) -> None:
        """Runs steps of one token for all sequences until each has `count` more."""
        for _ in range(count):
            self.step([(sequence, 1) for sequence in sequences])

    def _row_start(self, sequence: Tracked) -> RowStart:
        sequence.started = True
        return RowStart(
            row=sequence.row,
            params=sequence.params,
            seed=0,
            stop_token_ids=(),
            prompt_len=sequence.prompt_len,
            token_ids=np.array(sequence.tokens, np.int32),
            wants_vector=sequence.wants_vector,
        )

    def _grow(self, sequence: Tracked, num_tokens: int) -> list[TableDelta]:
        deltas: list[TableDelta] = []
        for group, blocks in enumerate(sequence.blocks):
            column = len(blocks) if sequence.started else 0
            while len(blocks) * BLOCK_SIZE < num_tokens:
                blocks.append(self.free_blocks.pop())
            if column < len(blocks):
                ids = np.array(blocks[column:], np.int32)
                deltas.append(row_delta(group, sequence.row, column, ids))
        return deltas

    def _pass_windows(self, sequence: Tracked) -> None:
        """Frees blocks that the sequence's next token cannot see."""
        for group, blocks in zip(self.groups, sequence.blocks, strict=True):
            first_seen = group.spec.visibility.first_visible(sequence.num_computed)
            self._release(blocks, 0, first_seen // BLOCK_SIZE)

    def _release(self, blocks: list[int], first: int, last: int) -> None:
        for column in range(first, last):
            if blocks[column]:
                self._freed_blocks.append(blocks[column])
                self.free_blocks.insert(0, blocks[column])
                blocks[column] = 0
