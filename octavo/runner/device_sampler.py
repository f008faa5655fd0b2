"""Chooses tokens where the logits are: the device's counterpart of `octavo.runner.sampler`.

Called by the model runner of a device: start_row and free_row as the plan says, sample once a
step. Never waits for the device, unless a row of the step reports log-probabilities.

Order and meaning are those of the host's sampler; the draws are others, of the same distribution.
Bad words of several tokens come with the step's masks: what they ban depends on the token before.

Shape legend: S sampled rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.kernels.backend import SamplingKernels
from octavo.request import SamplingParams
from octavo.runner.limits import RowLimits, both
from octavo.runner.sampler import SampledTokens, check_shape, token_logprobs
from octavo.runner.transfer import pack
from octavo.step import NO_TOKEN, Int32, RowStart, TokenLogprobs, Words

_FIRST_SLOTS = 4


class DeviceSampler:
    """Chooses the next token of each row. One owner calls it; not thread-safe.

    Work is enqueued on the current stream, and what a method changes holds for what is enqueued
    after it: rows may be started while earlier steps still run.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        kernels: SamplingKernels,
        upload: Callable[[Int32], Tensor] | None = None,
    ) -> None:
        """`upload` brings a step's arrays to the device (`octavo.runner.transfer`); None: each in
        pinned memory of its own."""
        self._kernels = kernels
        self._upload = upload or (lambda packed: _to_device(packed, device))
        self.last_sampled = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        """int32 [max_num_seqs] on the device: each row's last token, 0 where it was broken."""
        self._vocab_size = vocab_size
        self._device = device
        self._limits: list[RowLimits | None] = [None] * max_num_seqs
        self._is_limited = np.zeros(max_num_seqs, dtype=np.bool_)
        self._num_logprobs = np.full(max_num_seqs, -1)
        self._free_params = self._row_params(SamplingParams(temperature=0.0))
        self._params = np.full(max_num_seqs, self._free_params)
        self._device_params: Tensor | None = None
        """None when rows have changed."""
        self._penalties = _PenaltyTable(vocab_size, max_num_seqs, device)

    def start_row(self, start: RowStart) -> None:
        """Gives `start.row` to a sequence, whatever the row held; outputs known are replayed."""
        row, params = start.row, start.params
        self.free_row(row)
        self._device_params = None
        self._limits[row] = RowLimits.from_start(start, self._vocab_size)
        self._is_limited[row] = self._limits[row] is not None
        if params.logprobs is not None:
            self._num_logprobs[row] = params.logprobs
        fields = self._row_params(params)
        fields["seed"] = start.seed & (2**64 - 1)
        if params.has_penalties:
            fields["slot"] = self._penalties.start(start)
        self._params[row] = fields

    def free_row(self, row: int) -> None:
        """Forgets the row's sequence."""
        if self._params[row]["slot"] >= 0:
            self._penalties.free(int(self._params[row]["slot"]))
        self._limits[row], self._is_limited[row] = None, False
        self._num_logprobs[row] = -1
        self._params[row] = self._free_params

    def sample(
        self,
        logits_SV: Tensor,
        rows: Int32,
        output_indices: Int32,
        masks: Words | None = None,
    ) -> SampledTokens:
        """Returns one token per row of `logits_SV` (float32, on the device; may be changed), as
        int32 [S] on the device, and writes `last_sampled` at `rows`.

        `output_indices[i]` counts the outputs the sequence in `rows[i]` has so far. `masks`
        [S, ceil(V / 32)] on the host: a bit for each id that may be drawn. A row whose logits hold
        a NaN or nothing finite gets NO_TOKEN, and its neighbours their tokens.
        """
        check_shape(logits_SV, len(rows), self._vocab_size)
        reported = np.flatnonzero(self._num_logprobs[rows] >= 0)
        # Taken before anything changes them.
        raw_NV = logits_SV[_to_device(reported, self._device)] if len(reported) else None
        self._restrict(logits_SV, rows, output_indices, masks)
        batch_S2 = np.stack((rows, output_indices), axis=1).astype(np.int32)
        there = self._upload(batch_S2.reshape(-1)).view(-1, 2)
        token_ids = self.enqueue(logits_SV, there, rows)
        logprobs: dict[int, TokenLogprobs] = {}
        if raw_NV is not None:
            raw_NV = raw_NV.cpu()  # sync: these rows report what the host computes
            logprobs = self._report(raw_NV, reported, rows, token_ids)
        return SampledTokens(token_ids=token_ids, logprobs=logprobs)

    def enqueue(self, logits_SV: Tensor, batch_S2: Tensor, rows: Int32) -> Tensor:
        """Enqueues the choice of all rows and returns the tokens.

        `batch_S2` int32 on the device: `rows`, and their output indices.
        """
        if not len(rows):
            return torch.zeros(0, dtype=torch.int32, device=self._device)
        if self._device_params is None:
            table = self._params.view(np.int32).reshape(len(self._params), -1)
            self._device_params = _to_device(table, self._device)
        thresholds_S2 = batch_S2
        params, counts = self._params[rows], self._penalties.counts
        if (params["slot"] >= 0).any():
            self._kernels.penalise(logits_SV, batch_S2, self._device_params, counts)
        if ((params["min_p"] > 0) | (params["top_k"] > 0) | (params["top_p"] < 1)).any():
            thresholds_S2 = self._kernels.find_thresholds(logits_SV, batch_S2, self._device_params)
        return self._kernels.choose(
            logits_SV, batch_S2, self._device_params, thresholds_S2, self.last_sampled, counts
        )

    def _restrict(
        self,
        logits_SV: Tensor,
        rows: Int32,
        output_indices: Int32,
        masks: Words | None,
    ) -> None:
        """Enqueues what makes ids impossible, or more or less likely, before all else."""
        is_concerned = self._is_limited[rows] | (masks is not None)
        words: dict[int, Words] = {}
        biased: list[tuple[int, RowLimits]] = []
        for place in is_concerned.nonzero()[0].tolist():
            limits = self._limits[rows[place]]
            mask = None if masks is None else masks[place]
            if limits is not None:
                mask = both(mask, limits.at(int(output_indices[place])))
                if len(limits.bias_ids):
                    biased.append((place, limits))
            if mask is not None:
                words[place] = mask
        if words:
            parts = [np.array(list(words), np.int32), np.concatenate(list(words.values()))]
            packed, (at, bits) = pack([parts[0], parts[1].view(np.int32)])
            there = self._upload(packed)
            self._kernels.mask_logits(logits_SV, there[at], there[bits].view(len(words), -1))
        if biased:
            lengths = [len(limits.bias_ids) for _, limits in biased]
            places = np.repeat(np.array([place for place, _ in biased], np.int32), lengths)
            ids = np.concatenate([limits.bias_ids for _, limits in biased])
            values = np.concatenate([limits.bias for _, limits in biased])
            packed, parts = pack([places, ids, values.view(np.int32)])
            there = self._upload(packed)
            self._kernels.bias_logits(logits_SV, *(there[part] for part in parts))

    def _row_params(self, params: SamplingParams) -> NDArray[Any]:
        """Returns what the kernels know of a row, without seed and slot; a greedy one has no
        filters."""
        row = np.zeros((), dtype=self._kernels.row_params)
        row["top_p"], row["slot"] = 1, -1
        row["repetition"] = params.repetition_penalty
        row["frequency"], row["presence"] = params.frequency_penalty, params.presence_penalty
        if not params.is_greedy:
            row["inv_temperature"] = 1 / params.temperature
            row["min_p"], row["top_p"] = params.min_p, params.top_p
            row["top_k"] = params.top_k if params.top_k < self._vocab_size else 0
        return row

    def _report(
        self, raw_NV: Tensor, reported: NDArray[np.int64], rows: Int32, token_ids: Tensor
    ) -> dict[int, TokenLogprobs]:
        """Returns the log-probabilities of the rows `reported`, whose raw logits are given."""
        if not len(reported):
            return {}
        tokens = token_ids.cpu().numpy()  # sync: a log-probability is that of the drawn token
        return {
            int(i): token_logprobs(logits_V, int(tokens[i]), int(self._num_logprobs[rows[i]]))
            for i, logits_V in zip(reported, raw_NV.numpy(), strict=True)
            if tokens[i] != NO_TOKEN
        }


class _PenaltyTable:
    """Owns what penalties need of the sequences: a slot for each, for all ids of the vocabulary.

    As many slots as were ever used at once, doubled: a row without penalties costs nothing.
    """

    def __init__(self, vocab_size: int, max_slots: int, device: torch.device) -> None:
        self.counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        """int32 [slots, V]: times put out << 1 | seen in the prompt."""
        self._max_slots = max_slots
        self._free: list[int] = []

    def start(self, start: RowStart) -> int:
        """Returns a slot that holds the sequence's prompt and outputs."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        ids, times = np.unique(start.token_ids[start.prompt_len :], return_counts=True)
        seen = np.unique(start.token_ids[: start.prompt_len])
        counts = self.counts[slot]
        counts.zero_()
        for tokens, added in ((ids, 2 * times), (seen, np.ones_like(seen))):
            at = _to_device(tokens.astype(np.int64), counts.device)
            counts.index_add_(0, at, _to_device(added.astype(np.int32), counts.device))
        return slot

    def free(self, slot: int) -> None:
        self._free.append(slot)

    def _grow(self) -> None:
        old = self.counts
        size = min(max(_FIRST_SLOTS, 2 * len(old)), self._max_slots)
        assert size > len(old), "more slots than rows"
        self.counts = old.new_zeros((size, old.shape[1]))
        self.counts[: len(old)] = old
        self._free.extend(range(len(old), size))


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """Returns a copy on the device; enqueued, not waited for."""
    host = torch.from_numpy(np.array(values))
    if device.type == "cuda":
        # Fresh pinned memory, which torch does not hand out again before the copy has run.
        return host.pin_memory().to(device, non_blocking=True)
    return host
