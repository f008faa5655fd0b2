"""The soak benchmark on a tiny model: it loses nothing, and it notices what is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import Soak, load_llm, soak
from octavo import LLM
from octavo.request import FinishReason, TokenDelta


@pytest.fixture
def llm(tmp_path: Path) -> LLM:
    return load_llm("tiny", {"num_threads": 1, "device": "cpu"}, None, tmp_path)


def test_a_short_soak_preempts_and_loses_nothing(llm: LLM):
    account = soak(llm, seconds=120, max_requests=60, seed=1)
    assert account["problems"] == {}
    assert account["ok"]
    assert account["preemptions"] > 0
    assert account["ends"]["abort"] > 0
    assert sum(account["ends"].values()) == account["sequences"] >= 60
    llm.close()


def test_a_lost_token_and_a_second_end_are_noticed(llm: LLM, monkeypatch: pytest.MonkeyPatch):
    step, seen = llm.core.step, set[str]()

    def twisted() -> list[TokenDelta]:
        deltas = step()
        for delta in list(deltas):
            if delta.finish_reason is FinishReason.LENGTH:
                deltas.append(delta)
            elif delta.request_id not in seen:
                seen.add(delta.request_id)
                deltas.remove(delta)
        return deltas

    monkeypatch.setattr(llm.core, "step", twisted)
    load = Soak(llm, seed=1)
    load.run(lambda: load.num_requests >= 10)
    assert load.problems["news of a sequence that had ended"] > 0
    assert load.problems["sequences of a wrong length"] > 0
    llm.close()
