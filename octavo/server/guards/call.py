"""The guard of one call of the API: who asks for what, beside the texts.

Made by `inputs`; `generation` finds it in the request's state, and does nothing without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request

from octavo.guard import GuardCheck, GuardText, Refuse, Stage, Verdict
from octavo.outputs import OutputDelta
from octavo.server.engine_client import ServerTokenizer
from octavo.server.exchange import Exchange
from octavo.server.guards.gate import Gate, because
from octavo.server.state import server_state
from octavo.server.tenants.callers import caller_of

BEFORE_CHARS = 4096
"""Of what the client has already, the most that a guard is shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallGuard:
    """What a guard is told in all checks of one call."""

    gate: Gate
    exchange: Exchange
    tokenizer: ServerTokenizer
    route: str
    model: str
    tenant: str
    key: str

    @staticmethod
    def of(request: Request, gate: Gate) -> CallGuard:
        state, caller = server_state(request), caller_of(request)
        return CallGuard(
            gate=gate,
            exchange=request.scope["state"]["exchange"],
            tokenizer=state.engine.tokenizer,
            route=request.scope["path"],
            model=state.model_name,
            tenant=caller.tenant.name,
            key=caller.name,
        )

    @property
    def window(self) -> int:
        return self.gate.window

    @property
    def sees_output(self) -> bool:
        return "output" in self.gate.stages

    async def input(self, texts: tuple[GuardText, ...]) -> Verdict:
        """Returns what the guard says of a request. Raises ApiError."""
        if "input" not in self.gate.stages or not texts:
            return None
        return self._noted("input", await self.gate.decide(self._check("input", texts)))

    async def output(
        self, delta: OutputDelta, index: int, before: str, marks: ShownMarks
    ) -> OutputDelta | Refuse:
        """Returns what an answer gains, as the guard wants it, or why it ends here. Raises
        ApiError."""
        shown = marks.show(delta.text)
        if not shown:
            return delta
        texts = (GuardText(role="assistant", place=f"choices[{index}]", text=shown),)
        is_last = delta.finish_reason is not None
        check = self._check("output", texts, index=index, before=before, is_last=is_last)
        verdict = self._noted("output", await self.gate.decide(check))
        if verdict is None or isinstance(verdict, Refuse):
            return delta if verdict is None else verdict
        [text] = verdict.texts
        # Tokens and their log-probabilities would tell what was there before.
        delta.token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        delta.logprobs = ()
        delta.text = marks.bind(text)
        return delta

    def _check(
        self,
        stage: Stage,
        texts: tuple[GuardText, ...],
        *,
        index: int = 0,
        before: str = "",
        is_last: bool = True,
    ) -> GuardCheck:
        return GuardCheck(
            stage=stage,
            texts=texts,
            request_id=self.exchange.request_id,
            route=self.route,
            model=self.model,
            tenant=self.tenant,
            key=self.key,
            index=index,
            before=before,
            is_last=is_last,
        )

    def _noted(self, stage: Stage, verdict: Verdict) -> Verdict:
        if verdict is not None:
            exchange = self.exchange
            is_refusal = isinstance(verdict, Refuse)
            what = f"{stage}_{'refused' if is_refusal else 'rewritten'}"
            found = exchange.guarded = exchange.guarded or {}
            found[what] = found.get(what, 0) + 1
            if isinstance(verdict, Refuse):
                exchange.reason = f"the guard refused the {stage}{because(verdict)}"
        return verdict


class ShownMarks:
    """Special tokens of an answer, which stand in its text as marks, as a guard reads them."""

    __slots__ = ("_texts",)

    def __init__(self, marks: Mapping[int, str] | None, tokenizer: ServerTokenizer) -> None:
        """`marks` are those of `generation.Call`."""
        given = marks or {}
        self._texts = {mark: tokenizer.decode([one], False) for one, mark in given.items()}

    def show(self, text: str) -> str:
        """Returns a text with special tokens in place of marks."""
        if not text.isascii():
            for mark, shown in self._texts.items():
                text = text.replace(mark, shown)
        return text

    def bind(self, text: str) -> str:
        """Returns a text with marks in place of special tokens."""
        for mark, shown in self._texts.items():
            if shown:
                text = text.replace(shown, mark)
        return text
