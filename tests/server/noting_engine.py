"""A fake engine that remembers the text of the last chat."""

from __future__ import annotations

from octavo.engine.chat_template import RenderedChat
from tests.server.fake_engine import FakeEngine, FakeTokenizer
from tests.server.response_tools import FORMAT


class NotingTokenizer(FakeTokenizer):
    """Remembers the text of the last chat."""

    prompt = ""

    def encode_rendered(self, rendered: RenderedChat) -> list[int]:
        self.prompt = rendered.shown
        return super().encode_rendered(rendered)


class NotingEngine(FakeEngine):
    max_model_len = 8192

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer: NotingTokenizer = NotingTokenizer()
        self.answer_format = FORMAT
        self.answer = "Hello."
