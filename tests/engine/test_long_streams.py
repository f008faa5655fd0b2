"""A token costs the same at the end of a long stream as at its beginning, on the whole way."""

from __future__ import annotations

import time

from octavo.engine.mailbox import Inbox, Mailbox
from octavo.engine.output_processor import OutputProcessor
from octavo.outputs import DeltaSum, RequestOutput
from octavo.request import Request, SamplingParams, TokenDelta, pack_ids

NUM_TOKENS = 100_000
PART = 10_000


async def test_the_last_tokens_of_a_long_stream_cost_what_the_first_did(byte_tokenizer):
    """The promise is 1.2; a machine under load is given ten times the room."""
    ids = byte_tokenizer.encode("the quick fox jumps over the lazy dog ")
    request = Request(
        request_id="0-0",
        packed_prompt=pack_ids([1]),
        params=SamplingParams(max_tokens=NUM_TOKENS, stop=["never there"]),
    )
    processor, mailbox = OutputProcessor(byte_tokenizer), Mailbox()
    processor.open(request, Inbox(mailbox))
    output, total = RequestOutput.empty(request, "r", None), None
    seconds = []
    for start in range(0, NUM_TOKENS, PART):
        began = time.thread_time()
        for place in range(start, start + PART):
            token = (ids[place % len(ids)],)
            processor.process([TokenDelta(request_id="0-0", index=0, token_ids=token)], 1.0)
            for _, delta, _ in await mailbox.take():
                output.add(delta)
                if total is None:
                    total = DeltaSum(delta)
                else:
                    total.add(delta)
        seconds.append(time.thread_time() - began)
    assert len(output.outputs[0].token_ids) == NUM_TOKENS
    assert total is not None
    assert total.total().text == output.outputs[0].text
    ratio = min(seconds[-3:]) / min(seconds[:3])
    print(f"last over first: {ratio:.2f}, {1e6 * min(seconds) / PART:.1f} us a token")
    assert ratio < 12
