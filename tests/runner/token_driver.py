"""A device's runner whose KV is the token ids themselves, read back through the block tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from octavo.formats import KVFormats
from octavo.kernels.inputs import AttentionBatch
from octavo.kernels.planning import AttentionPlanner, PlanLimits, PlannedGroup
from octavo.kv_cache.spec import KVSpec, attention_kv
from octavo.kv_cache.storage import KVStorage
from octavo.parallel import ALONE
from octavo.runner.sampler import SampledTokens, token_logprobs
from octavo.step import Int32, RowStart, TokenLogprobs, Words
from tests.runner.device_driver import DeviceDriver

from octavo.kernels.triton.attention.plan import StepPlanner  # isort: skip


VOCAB = 97
NUM_EXPERTS = 3


def next_token(context: Sequence[int]) -> int:
    """Depends on every token of the context and its place, and needs no rounding."""
    return sum((3 * i + 1) * token + i for i, token in enumerate(context)) % VOCAB


def expected(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


class FakeDecoder:
    """A decoder of one layer. Steps of more than `max_tokens` tokens find no memory."""

    collectives = ALONE
    pooler = None

    def __init__(self) -> None:
        mixer = SimpleNamespace(op=SimpleNamespace(num_heads=1, num_kv_heads=1))
        self.spec = SimpleNamespace(
            vocab_size=VOCAB,
            layers=(SimpleNamespace(mixer=mixer),),
            moe_layers=(0,),
            max_experts=NUM_EXPERTS,
            kv_specs=lambda kv: (self.kv_spec(kv),),
        )
        self.layers = self.spec.layers
        self.ops = self
        self.max_tokens = 10**6
        self.sizes: list[tuple[int, int | None]] = []
        """(tokens, live ones if padded) of every forward that ran."""

    def kv_spec(self, kv: KVFormats) -> KVSpec:
        return attention_kv(1, 4, kv.key)

    def copy_blocks(self, arena: Tensor, copies: Sequence[tuple[int, int]]) -> None:
        for source, target in copies:
            arena[target] = arena[source]

    def planner(
        self, groups: Sequence[PlannedGroup], limits: PlanLimits, device: torch.device
    ) -> AttentionPlanner:
        return StepPlanner(groups, limits, 132)

    def forward(
        self,
        token_ids_T: Tensor,
        batches: tuple[AttentionBatch, ...],
        storage: KVStorage,
        counts_LE: Tensor,
        num_live: Tensor | None = None,
        *,
        behind_first: Callable[[], None] | None = None,
    ) -> Tensor:
        (batch,) = batches
        key = storage.layer(0).key[:, :, 0, 0]
        slots = batch.slot_mapping_T.long()
        real = slots >= 0
        blocks, offsets = slots[real] // storage.block_size, slots[real] % storage.block_size
        key[blocks, offsets] = token_ids_T[real].float()
        if len(token_ids_T) > self.max_tokens:
            raise torch.OutOfMemoryError(f"{len(token_ids_T)} tokens")
        live = len(token_ids_T) if num_live is None else int(num_live)
        assert int(real.sum()) == live
        self.sizes.append((len(token_ids_T), None if num_live is None else live))
        counts_LE[0] += torch.bincount(token_ids_T[:live] % NUM_EXPERTS, minlength=NUM_EXPERTS)
        rows = range(len(batch.seq_lens_S))
        digests = [digest for s in rows for digest in self._digests(batch, key, s)]
        return torch.tensor(digests, device=key.device).float()[:, None]

    def _digests(self, batch: AttentionBatch, key: Tensor, s: int) -> list[int]:
        """The next token of every token of sequence `s`; any token for padding."""
        first, stop = batch.query_starts[s : s + 2].tolist()
        length, block_size = int(batch.seq_lens_S[s]), key.shape[1]
        if length == 0:
            return [5] * (stop - first)
        table = batch.block_table[s, : -(-length // block_size)].long()
        context = key[table].reshape(-1)[:length].tolist()
        assert all(token == token for token in context), "poison was read"
        positions = batch.positions_T[first:stop].tolist()
        assert positions == list(range(length - (stop - first), length))
        return [next_token([int(token) for token in context[: p + 1]]) for p in positions]

    def logits(self, hidden_SM: Tensor) -> Tensor:
        ids = torch.arange(VOCAB, device=hidden_SM.device)
        return -(ids - hidden_SM).abs() / 8


class GreedySampler:
    """DeviceSampler's face; takes the most likely token."""

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        kernels: object,
        upload: object,
    ) -> None:
        self.last_sampled = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)
        self.started: dict[int, RowStart] = {}

    def start_row(self, start: RowStart) -> None:
        self.started[start.row] = start

    def free_row(self, row: int) -> None:
        self.started.pop(row, None)

    def sample(
        self,
        logits_SV: Tensor,
        rows: Int32,
        output_indices: Int32,
        masks: Words | None = None,
    ) -> SampledTokens:
        assert masks is None
        for row, index in zip(rows.tolist(), output_indices.tolist(), strict=True):
            start = self.started[row]
            assert index >= len(start.token_ids) - start.prompt_len
        tokens = logits_SV.argmax(dim=-1).int()
        self.last_sampled[torch.from_numpy(rows).long().to(tokens.device)] = tokens
        logprobs: dict[int, TokenLogprobs] = {}
        for i, row in enumerate(rows.tolist()):
            count = self.started[row].params.logprobs
            if count is not None:
                logprobs[i] = token_logprobs(logits_SV[i].cpu().numpy(), int(tokens[i]), count)
        return SampledTokens(token_ids=tokens, logprobs=logprobs)


class FakeDriver(DeviceDriver):
    """`decoder` may be told to fail; nothing is captured, since the fake looks at tensors."""

    use_graphs = False
    make_sampler = GreedySampler

    def __init__(self, **options: Any) -> None:
        self.decoder: Any = FakeDecoder()
        super().__init__(self.decoder, **options)
