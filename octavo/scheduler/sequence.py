"""One growing list of token ids with its progress: what the scheduler knows of a sequence.

Owned by the scheduler. No torch.
"""

from __future__ import annotations

from array import array

from octavo.grammar import Guide
from octavo.kv_cache.records import SequenceKV
from octavo.moments import Moment
from octavo.request import Request
from octavo.scheduler.fair_share import Account
from octavo.scheduler.rows import Rows
from octavo.step import TokenLogprobs


class Sequence:
    """Sample `index` of a request.

    `num_computed` chases `num_tokens`: prefill, chunks, prefix hits and recomputing after
    preemption are all the same catching up. `num_pending` tokens are sampled on the device but
    not known to the host yet, since scheduling runs one step ahead. A vector on its way is counted
    as such a token: it ends the sequence, whose limit is its prompt. Both are kept by `Rows` while
    it has a row.
    """

    __slots__ = (
        "_num_computed",
        "_num_pending",
        "_rows",
        "account",
        "eos_token_ids",
        "guide",
        "index",
        "is_finished",
        "is_masked",
        "kv",
        "lost_at",
        "max_len",
        "moments",
        "num_cached_tokens",
        "num_preemptions",
        "num_recomputed",
        "order",
        "prompt_len",
        "prompt_logprobs",
        "request",
        "row",
        "runs_alone",
        "scheduled_time",
        "seed",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        kv: SequenceKV,
        account: Account,
        *,
        seed: int,
        order: int,
        max_len: int,
    ) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.kv = kv
        self.account = account
        """Of its tenant."""
        self.seed = seed
        self.order = (request.priority, order)
        """Smaller goes first: priority, then arrival."""
        self.token_ids = array("i", request.packed_prompt)
        self.prompt_len = len(self.token_ids)
        num_outputs = 0 if request.wants_vector else params.max_tokens or max_len
        self.max_len = min(max_len, self.prompt_len + num_outputs)
        """Tokens at which it ends with finish reason length."""
        self.eos_token_ids = frozenset(() if params.ignore_eos else request.eos_token_ids)
        self.stop_ids = self.eos_token_ids | frozenset(params.stop_token_ids)
        self.guide: Guide | None = None
        """Where it stands in its grammar, if it is held to one; the core's to set."""
        self.is_masked = any(len(word) > 1 for word in params.bad_words_token_ids)
        """Whether what it may go on with depends on its newest token."""
        self.row: int | None = None
        self._rows: Rows | None = None
        """Where its counters are while it has a row."""
        self._num_computed = self._num_pending = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.num_recomputed = 0
        """Tokens computed once more after preemptions."""
        self.runs_alone = False
        """Nobody may run beside it, and it takes over nothing that is cached: with that, there was
        no room for it though nobody else ran. So there always is."""
        self.lost_at: list[int] = []
        """Tokens known at each time that a step of it alone raised."""
        self.prompt_logprobs: list[TokenLogprobs] | None = (
            None if params.prompt_logprobs is None or index else []
        )
        self.moments: list[Moment] | None = [] if request.is_traced else None
        """What has happened since it was told last, if it is traced."""
        self.scheduled_time: float | None = None
        self.is_finished = False

    def take_row(self, rows: Rows, row: int) -> None:
        """It runs, in a row that is free."""
        rows.take(row, self)
        self._rows, self.row = rows, row

    def leave_row(self) -> None:
        """It runs no more; its counters stay."""
        self._num_computed, self._num_pending = self.num_computed, self.num_pending
        self._rows = self.row = None

    def append(self, token: int) -> None:
        """The host knows one token more."""
        self.token_ids.append(token)
        if self._rows is not None:
            self._rows.known[self.row] += 1

    @property
    def num_computed(self) -> int:
        """Tokens whose KV is computed by a launched step."""
        rows, row = self._rows, self.row
        return self._num_computed if rows is None or row is None else rows.computed.item(row)

    @num_computed.setter
    def num_computed(self, count: int) -> None:
        if self._rows is None:
            self._num_computed = count
        else:
            self._rows.computed[self.row] = count

    @property
    def num_pending(self) -> int:
        """Tokens that were sampled on the device and are not known to the host yet."""
        rows, row = self._rows, self.row
        return self._num_pending if rows is None or row is None else rows.pending.item(row)

    @num_pending.setter
    def num_pending(self, count: int) -> None:
        if self._rows is None:
            self._num_pending = count
        else:
            self._rows.pending[self.row] = count

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - self.prompt_len
