"""From the core's deltas to texts: streaming, stop strings, one finish reason per sequence."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.engine.output_processor import OutputProcessor
from octavo.errors import EngineDeadError, OctavoError
from octavo.outputs import OutputDelta, PromptLogprobs, RequestOutput, with_texts
from octavo.request import (
    FinishReason,
    Logprob,
    PackedLogprobs,
    Request,
    SamplingParams,
    TokenDelta,
    pack_ids,
)
from octavo.scheduler.finish import packed_logprobs, position_logprobs
from octavo.step import TokenLogprobs


def delta(ids: list[int] | tuple[int, ...] = (), index: int = 0, **more: Any) -> TokenDelta:
    return TokenDelta(request_id="r", index=index, token_ids=tuple(ids), **more)


class Recorder:
    """A receiver that keeps every delta beside their sum."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self.output = RequestOutput.empty(request, "mine", "p")
        self.deltas: list[OutputDelta] = []
        self.ends: list[bool] = []
        self.errors: list[OctavoError] = []
        self._tokenizer = tokenizer

    def receive(self, delta: OutputDelta, finished: bool) -> None:
        self.deltas.append(delta)
        self.ends.append(finished)
        self.output.add(delta if self._tokenizer is None else self._named(delta))

    def _named(self, delta: OutputDelta) -> OutputDelta:
        return with_texts(delta, self._tokenizer.token_text)

    def grew(self, delta: OutputDelta, num_tokens: int) -> None:
        raise AssertionError("nothing waits here")

    def fail(self, error: OctavoError) -> None:
        self.errors.append(error)


def opened(
    tokenizer, *, kind: type[Recorder] = Recorder, **params: Any
) -> tuple[OutputProcessor, Recorder]:
    processor = OutputProcessor(tokenizer)
    request = Request(
        request_id="r",
        packed_prompt=pack_ids((5, 6)),
        params=SamplingParams(**params),
        arrival_time=1.0,
    )
    recorder = kind(request, tokenizer)
    processor.open(request, recorder)
    return processor, recorder


def test_deltas_and_cumulative_texts_agree(byte_tokenizer):
    text = "The quick \U0001f600 fox"
    processor, recorder = opened(byte_tokenizer)
    for i, token_id in enumerate(byte_tokenizer.encode(text)):
        assert processor.process([delta([token_id], num_cached_tokens=2)], now=2.0 + i) == []
        assert recorder.output.outputs[0].text == "".join(d.text for d in recorder.deltas)
        assert list(recorder.deltas[-1].token_ids) == [token_id]
        assert not recorder.output.finished
    processor.process([delta(finish_reason=FinishReason.LENGTH)], now=99.0)
    last = recorder.output
    assert last.outputs[0].text == text
    assert last.outputs[0].token_ids == byte_tokenizer.encode(text)
    assert (last.prompt, last.prompt_token_ids, last.num_cached_tokens) == ("p", [5, 6], 2)
    assert (last.outputs[0].finish_reason, last.finished) == ("length", True)
    times = (last.metrics.arrival_time, last.metrics.first_token_time, last.metrics.finished_time)
    assert times == (1.0, 2.0, 99.0)
    assert (processor.num_requests, processor.num_sequences) == (0, 0)
    assert recorder.ends == [False] * (len(recorder.ends) - 1) + [True]


def test_a_stop_string_ends_the_sequence_and_asks_the_core_to_abort_it(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer, stop=["quick"])
    ids = byte_tokenizer.encode("The quick fox")
    assert processor.process([delta(ids)]) == [("r", 0)]
    (sequence,) = recorder.output.outputs
    assert sequence.text == "The "
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", "quick")
    assert "quick" in byte_tokenizer.decode(sequence.token_ids)
    assert len(sequence.token_ids) < len(ids)
    assert processor.process([delta([7])]) == []
    assert len(recorder.deltas) == 1


def test_a_stop_string_in_the_last_token_wins_over_length_and_needs_no_abort(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer, stop=["fox"])
    ids = byte_tokenizer.encode("a fox")
    assert processor.process([delta(ids, finish_reason=FinishReason.LENGTH)]) == []
    assert recorder.output.outputs[0].finish_reason == "stop"
    assert recorder.output.outputs[0].text == "a "


@pytest.mark.parametrize(("includes", "text"), [(False, "a"), (True, "a quick")])
def test_the_text_of_a_stop_id_is_shown_only_if_asked(byte_tokenizer, includes, text):
    ids = [*byte_tokenizer.encode("a"), *byte_tokenizer.encode(" quick")]
    params = {"include_stop_str_in_output": includes, "stop_token_ids": ids[-1:]}
    processor, recorder = opened(byte_tokenizer, **params)
    processor.process(
        [delta(ids[:1]), delta(ids[1:], finish_reason=FinishReason.STOP, stop_reason=ids[-1])]
    )
    kept = 1 if includes else 1 + len(ids[1:-1])
    wanted = text if includes else byte_tokenizer.decode(ids[:kept])
    (sequence,) = recorder.output.outputs
    assert sequence.text == wanted
    assert sequence.token_ids == ids
    assert sequence.stop_reason == ids[-1]
    assert [added.text for added in recorder.deltas] == ["a", wanted[1:]]


def test_text_held_for_a_stop_string_comes_out_at_the_end(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer, stop=["quicker"])
    processor.process([delta(byte_tokenizer.encode("so quick"))])
    assert recorder.output.outputs[0].text == "so "
    processor.process([delta(finish_reason=FinishReason.LENGTH)])
    assert recorder.deltas[-1].text == "quick"
    assert recorder.output.outputs[0].text == "so quick"


def test_a_request_ends_when_its_last_sequence_does(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer, n=3)
    a = byte_tokenizer.encode("a")
    processor.process([delta(a, index=i) for i in (2, 0)])
    assert [added.index for added in recorder.deltas] == [2, 0]
    assert [sequence.text for sequence in recorder.output.outputs] == ["a", "", "a"]
    processor.process([delta(index=i, finish_reason=FinishReason.LENGTH) for i in (0, 1)])
    assert not recorder.output.finished
    before = len(recorder.deltas)
    processor.process([delta(a, index=0), delta(index=1, finish_reason=FinishReason.ERROR)])
    assert len(recorder.deltas) == before
    processor.process(
        [delta(index=2, finish_reason=FinishReason.ERROR, stop_reason="out of memory")]
    )
    assert recorder.output.finished
    assert recorder.ends[-1]
    assert [s.finish_reason for s in recorder.output.outputs] == ["length", "length", "error"]
    assert recorder.output.outputs[2].stop_reason == "out of memory"


def token_logprobs(token_ids: list[int], logprobs: list[float], rank: int) -> TokenLogprobs:
    ids, values = np.array(token_ids, np.int32), np.array(logprobs, np.float32)
    return TokenLogprobs(token_ids=ids, logprobs=values, rank=rank)


def test_positions_of_a_prompt_cross_processes_packed_and_come_out_as_they_were():
    found = [
        token_logprobs([7, 8, 7], [-2.5, -0.25, -2.5], rank=2),
        token_logprobs([0, 1, 2], [-1e30, -0.5, -1.0], rank=300),
    ]
    packed = msgspec.msgpack.decode(
        msgspec.msgpack.encode(packed_logprobs(found)), type=PackedLogprobs
    )
    positions = PromptLogprobs(packed)
    assert len(positions) == 3
    assert list(positions) == [None, *map(position_logprobs, found)]
    assert positions[-1] == position_logprobs(found[1])
    assert positions[1:] == [*map(position_logprobs, found)]
    assert list(PromptLogprobs(packed_logprobs([]))) == [None]


def test_logprobs_are_found_by_id_carry_their_texts_and_sum_up(byte_tokenizer):
    ids = byte_tokenizer.encode("the fox jumps")[:3]
    positions = tuple(
        (Logprob(token_id=i, logprob=-0.5, rank=1), Logprob(token_id=999 - i, logprob=-2.0))
        for i in ids
    )
    processor, recorder = opened(byte_tokenizer, logprobs=1, prompt_logprobs=1)
    prompts = packed_logprobs([token_logprobs([ids[0], 999 - ids[0]], [-0.5, -2.0], rank=1)])
    processor.process([delta(ids[:1], logprobs=positions[:1], prompt_logprobs=prompts)])
    processor.process([delta(ids[1:], logprobs=positions[1:])])
    sequence = recorder.output.outputs[0]
    assert sequence.cumulative_logprob == pytest.approx(-1.5)
    assert sequence.logprobs is not None
    assert [list(position) for position in sequence.logprobs] == [[i, 999 - i] for i in ids]
    texts = [position[i].decoded_token for i, position in zip(ids, sequence.logprobs, strict=True)]
    assert "".join(map(str, texts)) == byte_tokenizer.decode(ids)
    assert recorder.output.prompt_logprobs is not None
    first, second = recorder.output.prompt_logprobs
    assert first is None
    assert second is not None
    assert second[ids[0]].decoded_token == texts[0]


def test_a_drawn_token_that_is_among_the_best_is_one_entry(byte_tokenizer):
    drawn = Logprob(token_id=7, logprob=-0.5, rank=1)
    best = (Logprob(token_id=7, logprob=-0.5, rank=1), Logprob(token_id=8, logprob=-1.0, rank=2))
    processor, recorder = opened(byte_tokenizer, logprobs=2)
    processor.process([delta([7], logprobs=((drawn, *best),))])
    assert recorder.output.outputs[0].logprobs is not None
    assert list(recorder.output.outputs[0].logprobs[0]) == [7, 8]


def test_a_stop_string_cuts_ids_and_logprobs_alike(byte_tokenizer):
    ids = byte_tokenizer.encode("The quick fox")
    positions = tuple((Logprob(token_id=i, logprob=-1.0),) for i in ids)
    processor, recorder = opened(byte_tokenizer, stop=["qu"], logprobs=0)
    processor.process([delta(ids, logprobs=positions)])
    sequence = recorder.output.outputs[0]
    assert sequence.logprobs is not None
    assert [next(iter(position)) for position in sequence.logprobs] == sequence.token_ids
    assert sequence.cumulative_logprob == -float(len(sequence.token_ids))


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_without_text_the_ids_alone_come_out(byte_tokenizer, has_tokenizer):
    processor, recorder = opened(byte_tokenizer if has_tokenizer else None, detokenize=False)
    processor.process([delta([7, 8], finish_reason=FinishReason.STOP)])
    output = recorder.output
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [7, 8])
    assert output.finished


def test_a_closed_request_hears_nothing_more(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer, n=2)
    assert processor.close("r")
    assert not processor.close("r")
    assert processor.process([delta([7])]) == []
    assert recorder.deltas == []
    assert processor.num_sequences == 0


def test_an_engine_that_dies_tells_every_open_request_once(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer)
    error = EngineDeadError("gone")
    processor.fail_all(error)
    processor.fail("r", error)
    assert recorder.errors == [error]


def test_a_long_text_costs_its_length_not_its_square():
    output = RequestOutput.empty(
        Request(request_id="r", packed_prompt=pack_ids([1]), params=SamplingParams()), "r", None
    )
    sequence = output.outputs[0]
    for _ in range(1000):
        output.add(OutputDelta(index=0, text="ab", token_ids=(1,)))
    assert len(sequence._pieces) == 1000, "nothing is joined before it is read"
    assert sequence.text == "ab" * 1000
    assert len(sequence._pieces) == 1


def test_outputs_print_token_ids_and_texts_not_packed_bytes(byte_tokenizer):
    processor, recorder = opened(byte_tokenizer)
    processor.process([delta(byte_tokenizer.encode("a fox"), finish_reason=FinishReason.STOP)])
    text = repr(recorder.output)
    assert "prompt_token_ids=[5, 6]" in text
    assert "packed" not in text
    assert "deltas" not in text


@given(
    steps=st.lists(
        st.tuples(st.integers(0, 1), st.sampled_from(("token", "two", "read"))), max_size=60
    )
)
def test_what_a_late_reader_gets_is_what_a_prompt_one_would(byte_tokenizer, steps) -> None:
    """Whatever grows while it waits: texts, ids and numbers of tokens are the same."""

    class Late(Recorder):
        """Looks at what came only now and then."""

        def __init__(self, request: Request, tokenizer: Any) -> None:
            super().__init__(request, tokenizer)
            self.waiting: list[OutputDelta] = []
            self.num_told = 0

        def receive(self, delta: OutputDelta, finished: bool) -> None:
            self.num_told += len(delta.token_ids)
            delta.is_waiting = True
            self.waiting.append(delta)

        def grew(self, delta: OutputDelta, num_tokens: int) -> None:
            assert delta in self.waiting
            self.num_told += num_tokens

        def read(self) -> None:
            for one in self.waiting:
                one.is_waiting = False
                self.output.add(one)
            self.waiting.clear()

    def run(kind: type[Recorder]) -> Recorder:
        processor, recorder = opened(byte_tokenizer, kind=kind, n=2)
        ids = itertools.cycle(byte_tokenizer.encode("A \U0001f600 fox"))
        for now, (index, what) in enumerate(steps):
            if what != "read":
                tokens = list(itertools.islice(ids, 1 + (what == "two")))
                processor.process([delta(tokens, index=index)], now=float(now))
            elif isinstance(recorder, Late):
                recorder.read()
        ends = [delta(index=index, finish_reason=FinishReason.LENGTH) for index in (0, 1)]
        processor.process(ends, now=99.0)
        if isinstance(recorder, Late):
            recorder.read()
            assert recorder.num_told == sum(len(one.token_ids) for one in recorder.output.outputs)
        return recorder

    prompt, late = run(Recorder), run(Late)
    assert late.output.outputs == prompt.output.outputs
    assert late.output.finished
