"""Owns how a token is chosen from a row of logits, and the log-probabilities that are reported.

Called by the model runner where logits lie on the host, and by the device's sampler for what only
the host knows: start_row and free_row as the plan says, sample once a step. Never knows of requests
or text, and never lets one row's result depend on another row of the batch.

Order, as in vLLM: allowed ids, logit bias, min_tokens and bad words, penalties; then greedy takes
the best, others go through temperature, min_p, top_k, top_p and one draw. Reported
log-probabilities are those of the raw logits. Equal logits: the lowest token id wins. Logits are
looked at after all that changes them: where they hold a NaN or nothing finite then, no token.

Rows are worked on one by one, so that no reduction can see the neighbours. On one row NumPy's
partition, sort and argmax are 4 to 12 times faster than torch's, torch's exp and cumsum 2 to 4
times faster than NumPy's; hence the mixture.

Shape legend: S sampled rows, P prompt positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from octavo.errors import OctavoError
from octavo.request import SamplingParams
from octavo.runner.random import uniform
from octavo.step import NO_TOKEN, Bool, Float32, Int32, RowStart, TokenLogprobs, Words

Ids = NDArray[np.int64]

# The top-p set nearly always lies among so many best tokens; if not, more are sorted.
_TOP_P_GUESS = 1024
# An allowed id stays possible even where the model's own logit is minus infinity.
_LOWEST = np.float32(-1e30)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What one step drew: int32 [S], and log-probabilities by index for rows that asked."""

    token_ids: Tensor
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Chooses the next token of each row. One owner calls it; not thread-safe."""

    def __init__(self, vocab_size: int, max_num_seqs: int) -> None:
        self._vocab_size = vocab_size
        self._rows: list[_Row | None] = [None] * max_num_seqs
        self._is_plain = np.zeros(max_num_seqs, dtype=np.bool_)
        self.last_sampled = torch.zeros(max_num_seqs, dtype=torch.int32)
        """int32 [max_num_seqs]: each row's last token, 0 where it was broken."""

    def start_row(self, start: RowStart) -> None:
        """Gives `start.row` to a sequence, whatever the row held; outputs known are replayed."""
        row = _Row.from_start(start, self._vocab_size)
        self._rows[start.row] = row
        self._is_plain[start.row] = row.is_plain

    def free_row(self, row: int) -> None:
        """Forgets the row's sequence."""
        self._rows[row] = None
        self._is_plain[row] = False

    def sample(
        self,
        logits_SV: Tensor,
        rows: Int32,
        output_indices: Int32,
        masks: Words | None = None,
    ) -> SampledTokens:
        """Returns one token per row of `logits_SV` (float32, on the CPU, left as it is), and writes
        `last_sampled` at `rows`.

        `output_indices[i]` counts the outputs the sequence in `rows[i]` has so far; `masks`
        [S, ceil(V / 32)] has a bit for each id that may be drawn. A row whose logits hold a NaN or
        nothing finite gets NO_TOKEN, and its neighbours their tokens.
        """
        logits = logits_SV.numpy()
        check_shape(logits_SV, len(rows), self._vocab_size)
        is_plain = self._is_plain[rows] if masks is None else np.zeros(len(rows), np.bool_)
        token_ids = np.zeros(len(rows), dtype=np.int32)
        if is_plain.all():
            token_ids[:] = logits.argmax(axis=1)
        else:
            for i in np.flatnonzero(is_plain):
                token_ids[i] = logits[i].argmax()
        # argmax stops at a NaN, so the chosen logit tells.
        chosen = logits[np.arange(len(rows)), token_ids]
        token_ids[~np.isfinite(chosen) & is_plain] = NO_TOKEN
        logprobs: dict[int, TokenLogprobs] = {}
        for i in np.flatnonzero(~is_plain):
            state = self._rows[rows[i]]
            assert state is not None, f"row {rows[i]} was sampled but never started"
            allowed = None if masks is None else _unpacked(masks[i], self._vocab_size)
            token = _choose(logits[i], state, int(output_indices[i]), allowed)
            if not 0 <= token < self._vocab_size:
                token_ids[i] = NO_TOKEN
                continue
            token_ids[i] = token
            state.append(token)
            if state.params.logprobs is not None:
                logprobs[int(i)] = token_logprobs(logits[i], token, state.params.logprobs)
        # A step that is under way already needs some input for a broken row: any token will do.
        self.last_sampled.numpy()[rows] = token_ids.clip(min=0)
        return SampledTokens(token_ids=torch.from_numpy(token_ids), logprobs=logprobs)


def prompt_logprobs(
    logits_PV: Tensor, targets_P: Int32, num_logprobs: int
) -> tuple[TokenLogprobs, ...]:
    """Returns for each position the log-probability of its target and of the likeliest tokens."""
    logits = logits_PV.numpy()
    return tuple(
        token_logprobs(row_V, int(target), num_logprobs)
        for row_V, target in zip(logits, targets_P, strict=True)
    )


@np.errstate(over="ignore", invalid="ignore")
def token_logprobs(logits_V: Float32, token: int, num_logprobs: int) -> TokenLogprobs:
    """Returns log_softmax at `token` and at the `num_logprobs` likeliest ids, with its rank.

    Broken logits (a NaN, nothing finite) give NaN for some or all, and never raise.
    """
    best = logits_V.max()
    normaliser = best + np.log(np.exp(logits_V - best).sum(dtype=np.float64))
    value = logits_V[token]
    rank = 1 + np.count_nonzero(logits_V > value) + np.count_nonzero(logits_V[:token] == value)
    ids = np.array([token], dtype=np.int64)
    if num_logprobs:
        size = len(logits_V)
        count = min(num_logprobs, size)
        threshold = np.partition(logits_V, size - count)[size - count]
        top = _best_ids(logits_V, threshold, count)
        ids = np.concatenate((ids, top[np.argsort(-logits_V[top], kind="stable")]))
    return TokenLogprobs(
        token_ids=ids.astype(np.int32),
        logprobs=(logits_V[ids] - normaliser).astype(np.float32),
        rank=int(rank),
    )


def check_shape(logits_SV: Tensor, num_rows: int, vocab_size: int) -> None:
    """Raises OctavoError unless the logits are [num_rows, vocab_size]."""
    found, wanted = tuple(logits_SV.shape), (num_rows, vocab_size)
    if found != wanted:
        raise OctavoError(f"logits have shape {found}, wanted {wanted}")


@dataclass(slots=True, kw_only=True)
class _Row:
    """Sampling state of one sequence."""

    params: SamplingParams
    seed: int
    is_plain: bool
    """Greedy with nothing to change or report: an argmax is all."""
    stop_ids: Ids
    allowed_ids: Ids | None
    bias_ids: Ids
    bias: Float32
    bad_ids: Ids
    """Bad words of one token."""
    bad_sequences: tuple[tuple[int, ...], ...]
    """Bad words of several: the last is banned after the others."""
    counts: _Counts | None
    outputs: list[int] = field(default_factory=list)
    """Kept only for bad words of several tokens."""

    @staticmethod
    def from_start(start: RowStart, vocab_size: int) -> _Row:
        params = start.params
        bias = params.logit_bias or {}
        allowed = params.allowed_token_ids
        bad = params.bad_words_token_ids
        outputs = start.token_ids[start.prompt_len :].tolist()
        counts = None
        if params.has_penalties:
            counts = _Counts(start.token_ids[: start.prompt_len].tolist(), outputs)
        has_changes = bool(bias or allowed or bad or params.has_penalties or params.min_tokens)
        return _Row(
            params=params,
            seed=start.seed,
            is_plain=params.is_greedy and not has_changes and params.logprobs is None,
            # A tokenizer may know more ids than the model: they are never drawn anyway.
            stop_ids=_ids([token for token in start.stop_token_ids if token < vocab_size]),
            allowed_ids=None if allowed is None else _ids(allowed),
            bias_ids=_ids(tuple(bias)),
            bias=np.array(list(bias.values()), dtype=np.float32),
            bad_ids=_ids([word[0] for word in bad if len(word) == 1]),
            bad_sequences=tuple(word for word in bad if len(word) > 1),
            counts=counts,
            outputs=outputs,
        )

    def append(self, token: int) -> None:
        """Notes a drawn token, as far as later draws depend on it."""
        if self.counts is not None:
            self.counts.add(token, 1)
        if self.bad_sequences:
            self.outputs.append(token)

    def has_changes(self, output_index: int) -> bool:
        """Whether more than a mask of the step changes this row's logits."""
        is_banned = len(self.bad_ids) or self.bad_sequences or output_index < self.params.min_tokens
        is_free = self.allowed_ids is None and self.counts is None and not len(self.bias_ids)
        return bool(is_banned or not is_free)

    def banned(self, output_index: int) -> Ids:
        """Returns the ids that must not be drawn as output number `output_index`."""
        parts = [self.bad_ids]
        if output_index < self.params.min_tokens:
            parts.append(self.stop_ids)
        if self.bad_sequences:
            done = self.outputs
            ends = [word[-1] for word in self.bad_sequences if _ends_with(done, word[:-1])]
            parts.append(_ids(ends))
        return np.concatenate(parts)


class _Counts:
    """How often each id of a sequence was put out; prompt ids are there with 0.

    Only ids that occur are kept: a step costs the sequence's distinct ids, not the vocabulary.
    """

    def __init__(self, prompt: Sequence[int], outputs: Sequence[int]) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token in prompt:
            self.add(token, 0)
        for token in outputs:
            self.add(token, 1)

    def add(self, token: int, times: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate((self._ids, np.zeros_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[slot] = token
        self._counts[slot] += times

    def penalise(self, x_V: Float32, params: SamplingParams) -> None:
        """Changes the logits of the ids seen: repetition, then frequency, then presence."""
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        x = x_V[ids]
        repetition = np.float32(params.repetition_penalty)
        x = np.where(x > 0, x / repetition, x * repetition)
        x -= np.float32(params.frequency_penalty) * counts
        x -= np.float32(params.presence_penalty) * (counts > 0)
        x_V[ids] = x


def _choose(
    logits_V: Float32, state: _Row, output_index: int, allowed_V: Bool | None = None
) -> int:
    """Returns the next token of one row, NO_TOKEN if its logits are broken."""
    best = int(logits_V.argmax())  # which stops at a NaN
    if not np.isfinite(logits_V[best]):
        return NO_TOKEN
    with np.errstate(over="ignore", invalid="ignore"):
        if allowed_V is None or state.has_changes(output_index):
            return _pick(_changed(logits_V, state, output_index, allowed_V), state, output_index)
        ids = np.flatnonzero(allowed_V)  # the same among these alone: most often they are few
        if not len(ids):
            return NO_TOKEN
        return int(ids[_pick(np.maximum(logits_V[ids], _LOWEST), state, output_index)])


def _pick(x_V: Float32, state: _Row, output_index: int) -> int:
    """Returns the place of the logit that is chosen, NO_TOKEN if none is finite."""
    best = int(x_V.argmax())
    if not np.isfinite(x_V[best]):
        return NO_TOKEN
    if state.params.is_greedy:
        return best
    # The difference first: a quotient of a huge logit would be infinite.
    scaled_V = (x_V - x_V[best]) / np.float32(state.params.temperature)
    return _draw(torch.from_numpy(scaled_V).exp_().numpy(), state, output_index)


def _draw(weights_V: Float32, state: _Row, output_index: int) -> int:
    """Returns an id drawn from the weights that the filters leave; the largest weight is 1."""
    kept = _kept(weights_V, state.params)
    cumulative = _cumulative(weights_V if kept is None else weights_V[kept])
    drawn = uniform(state.seed, output_index) * cumulative[-1]
    # The first whose cumulative weight exceeds the drawn one, hence never one of weight 0.
    place = int(cumulative.searchsorted(drawn, side="right"))
    return place if kept is None else int(kept[place])


def _changed(logits_V: Float32, state: _Row, output_index: int, allowed_V: Bool | None) -> Float32:
    """Returns the logits after masks, bias, bans and penalties; a copy if any applies."""
    if state.is_plain and allowed_V is None:
        return logits_V
    allowed_V = _allowed(state, allowed_V, len(logits_V))
    x_V = logits_V.copy()
    if allowed_V is not None:
        np.maximum(x_V, _LOWEST, out=x_V)
        x_V[~allowed_V] = -np.inf
    if len(state.bias_ids):
        x_V[state.bias_ids] += state.bias
    banned = state.banned(output_index)
    if len(banned):
        before = x_V[banned]
        x_V[banned] = -np.inf
        if x_V.max() == -np.inf:
            # Nothing is left (only stop ids allowed, say): a token is owed, so the bans give way.
            x_V[banned] = before
    if state.counts is not None:
        state.counts.penalise(x_V, state.params)
    return x_V


def _allowed(state: _Row, masked_V: Bool | None, vocab_size: int) -> Bool | None:
    """Returns which ids may be drawn: those of the mask that the request allows too, all of the
    mask where there are none."""
    if state.allowed_ids is None:
        return masked_V
    allowed_V = np.zeros(vocab_size, np.bool_)
    allowed_V[state.allowed_ids] = True
    if masked_V is None:
        return allowed_V
    both_V = allowed_V & masked_V
    return both_V if both_V.any() else masked_V


def _unpacked(words: Words, vocab_size: int) -> Bool:
    """Returns the bits of a mask, one by one."""
    bits = np.unpackbits(words.view(np.uint8), count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


def _kept(weights_V: Float32, params: SamplingParams) -> Ids | None:
    """Returns the ids that min_p, top_k and top_p leave, ascending; None for all.

    `weights_V` are probabilities up to a factor, the largest being 1.
    """
    size = len(weights_V)
    count = size
    if params.min_p > 0:
        count = int(np.count_nonzero(weights_V >= np.float32(params.min_p)))
    if params.top_k:
        count = min(count, params.top_k)
    if params.top_p < 1:
        best = _top_p(weights_V, count, params.top_p)
        count, threshold = len(best), best[-1]
    elif count < size:
        threshold = np.partition(weights_V, size - count)[size - count]
    else:
        return None
    return _best_ids(weights_V, threshold, count)


def _top_p(weights_V: Float32, count: int, top_p: float) -> Float32:
    """Returns the fewest largest weights that hold `top_p` of the `count` largest, descending."""
    size = len(weights_V)
    total = weights_V.sum(dtype=np.float64) if count == size else None
    # So many are nearly always enough; all that count are for certain.
    for guess in (min(count, _TOP_P_GUESS), min(count, 16 * _TOP_P_GUESS), count):
        head = weights_V if guess == size else np.partition(weights_V, size - guess)[size - guess :]
        head = -np.sort(-head)
        cumulative = _cumulative(head)
        if guess == count:
            total = cumulative[-1]
        if total is not None and cumulative[-1] >= top_p * total:
            return head[: int(cumulative.searchsorted(top_p * total)) + 1]
    raise AssertionError(f"weights that are not sound: {weights_V}")


def _cumulative(weights: Float32) -> NDArray[np.float64]:
    """Returns running sums in float64, summed one after the other."""
    return torch.from_numpy(weights).cumsum(0, dtype=torch.float64).numpy()


def _best_ids(values_V: Float32, threshold: np.float32, count: int) -> Ids:
    """Returns the ids of the `count` largest values, ascending; `threshold` is the least of them.
    Among equals at the threshold the lowest ids stay."""
    ids = np.flatnonzero(values_V >= threshold)
    surplus = len(ids) - count
    if surplus > 0:
        ties = np.flatnonzero(values_V[ids] == threshold)
        ids = np.delete(ids, ties[len(ties) - surplus :])
    return ids


def _ids(token_ids: Sequence[int]) -> Ids:
    return np.array(token_ids, dtype=np.int64)


def _ends_with(tokens: list[int], tail: tuple[int, ...]) -> bool:
    return len(tokens) >= len(tail) and tuple(tokens[-len(tail) :]) == tail
