"""From the core's deltas to texts: streaming, stop strings, one finish reason per sequence."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.engine.output_processor import OutputProcessor
from octavo.request import FinishReason, Logprob, Request, SamplingParams, TokenDelta, pack_ids


def delta(ids: list[int] | tuple[int, ...] = (), index: int = 0, **more: Any) -> TokenDelta:
    return TokenDelta(request_id="r", index=index, token_ids=tuple(ids), **more)


def opened(tokenizer, prompt_text: str | None = "p", **params: Any) -> OutputProcessor:
    processor = OutputProcessor(tokenizer)
    request = Request(
        request_id="r",
        packed_prompt=pack_ids((5, 6)),
        params=SamplingParams(**params),
        arrival_time=1.0,
    )
    processor.add_request(request, prompt_text)
    return processor


def test_deltas_and_cumulative_texts_agree(byte_tokenizer):
    text = "The quick \U0001f600 fox"
    processor = opened(byte_tokenizer)
    parts = []
    for i, token_id in enumerate(byte_tokenizer.encode(text)):
        (output,) = processor.process([delta([token_id], num_cached_tokens=2)], now=2.0 + i).outputs
        parts.append(output.deltas[0].text)
        assert output.outputs[0].text == "".join(parts)
        assert output.deltas[0].token_ids == [token_id]
        assert not output.finished
    (last,) = processor.process([delta(finish_reason=FinishReason.LENGTH)], now=99.0).outputs
    assert last.outputs[0].text == text
    assert last.outputs[0].token_ids == byte_tokenizer.encode(text)
    assert (last.prompt, last.prompt_token_ids, last.num_cached_tokens) == ("p", [5, 6], 2)
    assert (last.outputs[0].finish_reason, last.finished) == ("length", True)
    assert last.metrics is not None
    times = (last.metrics.arrival_time, last.metrics.first_token_time, last.metrics.finished_time)
    assert times == (1.0, 2.0, 99.0)
    assert processor.num_requests == 0


def test_a_stop_string_ends_the_sequence_and_asks_the_core_to_abort_it(byte_tokenizer):
    processor = opened(byte_tokenizer, stop=["quick"])
    ids = byte_tokenizer.encode("The quick fox")
    result = processor.process([delta(ids)])
    output = result.outputs[0]
    assert result.aborts == [("r", 0)]
    assert output.outputs[0].text == "The "
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", "quick")
    assert "quick" in byte_tokenizer.decode(output.outputs[0].token_ids)
    assert len(output.outputs[0].token_ids) < len(ids)
    assert processor.process([delta([7])]).outputs == []


def test_a_stop_string_in_the_last_token_wins_over_length_and_needs_no_abort(byte_tokenizer):
    processor = opened(byte_tokenizer, stop=["fox"])
    ids = byte_tokenizer.encode("a fox")
    result = processor.process([delta(ids, finish_reason=FinishReason.LENGTH)])
    assert result.aborts == []
    assert result.outputs[0].outputs[0].finish_reason == "stop"
    assert result.outputs[0].outputs[0].text == "a "


@pytest.mark.parametrize(("includes", "text"), [(False, "a"), (True, "a quick")])
def test_the_text_of_a_stop_id_is_shown_only_if_asked(byte_tokenizer, includes, text):
    processor = opened(byte_tokenizer, include_stop_str_in_output=includes)
    ids = [*byte_tokenizer.encode("a"), *byte_tokenizer.encode(" quick")]
    (output,) = processor.process(
        [delta(ids[:1]), delta(ids[1:], finish_reason=FinishReason.STOP, stop_reason=ids[-1])]
    ).outputs
    kept = 1 if includes else 1 + len(ids[1:-1])
    wanted = text if includes else byte_tokenizer.decode(ids[:kept])
    assert output.outputs[0].text == wanted
    assert output.outputs[0].token_ids == ids
    assert output.outputs[0].stop_reason == ids[-1]
    assert [added.text for added in output.deltas] == ["a", wanted[1:]]


def test_text_held_for_a_stop_string_comes_out_at_the_end(byte_tokenizer):
    processor = opened(byte_tokenizer, stop=["quicker"])
    ids = byte_tokenizer.encode("so quick")
    (output,) = processor.process([delta(ids)]).outputs
    assert output.outputs[0].text == "so "
    (output,) = processor.process([delta(finish_reason=FinishReason.LENGTH)]).outputs
    assert output.deltas[0].text == "quick"
    assert output.outputs[0].text == "so quick"


def test_a_request_ends_when_its_last_sequence_does(byte_tokenizer):
    processor = opened(byte_tokenizer, n=3)
    a = byte_tokenizer.encode("a")
    round_one = [delta(a, index=i) for i in (2, 0)]
    (output,) = processor.process(round_one).outputs
    assert [added.index for added in output.deltas] == [2, 0]
    assert [sequence.text for sequence in output.outputs] == ["a", "", "a"]
    ends = [delta(index=i, finish_reason=FinishReason.LENGTH) for i in (0, 1)]
    assert not processor.process(ends).outputs[0].finished
    late = [delta(a, index=0), delta(index=1, finish_reason=FinishReason.ERROR), delta(index=9)]
    assert processor.process(late).outputs == []
    (output,) = processor.process(
        [delta(index=2, finish_reason=FinishReason.ERROR, stop_reason="out of memory")]
    ).outputs
    assert output.finished
    assert [s.finish_reason for s in output.outputs] == ["length", "length", "error"]
    assert output.outputs[2].stop_reason == "out of memory"


def test_logprobs_carry_their_tokens_texts_and_sum_up(byte_tokenizer):
    ids = byte_tokenizer.encode("the fox jumps")[:3]
    positions = tuple(
        (Logprob(token_id=i, logprob=-0.5, rank=1), Logprob(token_id=ids[0], logprob=-2.0))
        for i in ids
    )
    processor = opened(byte_tokenizer, logprobs=1, prompt_logprobs=1)
    (output,) = processor.process(
        [delta(ids[:1], logprobs=positions[:1], prompt_logprobs=(None, positions[0]))]
    ).outputs
    (output,) = processor.process([delta(ids[1:], logprobs=positions[1:])]).outputs
    sequence = output.outputs[0]
    assert sequence.cumulative_logprob == pytest.approx(-1.5)
    assert sequence.logprobs is not None
    assert len(sequence.logprobs) == 3
    texts = [position[0].decoded_token for position in sequence.logprobs]
    assert "".join(map(str, texts)) == byte_tokenizer.decode(ids)
    assert output.deltas[0].logprobs == sequence.logprobs[1:]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] is not None
    assert output.prompt_logprobs[1][0].decoded_token == texts[0]


def test_a_stop_string_cuts_ids_and_logprobs_alike(byte_tokenizer):
    ids = byte_tokenizer.encode("The quick fox")
    positions = tuple((Logprob(token_id=i, logprob=-1.0),) for i in ids)
    processor = opened(byte_tokenizer, stop=["qu"], logprobs=0)
    (output,) = processor.process([delta(ids, logprobs=positions)]).outputs
    sequence = output.outputs[0]
    assert sequence.logprobs is not None
    assert [p[0].token_id for p in sequence.logprobs] == sequence.token_ids
    assert sequence.cumulative_logprob == -float(len(sequence.token_ids))


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_without_text_the_ids_alone_come_out(byte_tokenizer, has_tokenizer):
    processor = opened(byte_tokenizer if has_tokenizer else None, None, detokenize=False)
    (output,) = processor.process([delta([7, 8], finish_reason=FinishReason.STOP)]).outputs
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [7, 8])
    assert output.finished


def test_an_abort_gives_every_open_sequence_its_reason(byte_tokenizer):
    processor = opened(byte_tokenizer, n=2, stop=["quicker"])
    ids = byte_tokenizer.encode("quick")
    processor.process([delta(ids), delta(index=1, finish_reason=FinishReason.LENGTH)])
    output = processor.abort("r")
    assert output is not None
    assert output.finished
    assert [s.finish_reason for s in output.outputs] == ["abort", "length"]
    assert output.outputs[0].text == "quick"
    assert processor.abort("r") is None
    assert processor.process([delta([7])]).outputs == []
