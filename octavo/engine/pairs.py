"""From a query and a document to the one prompt that a model scores.

Used by the faces and the server. Which prompt that is, the model's chat template says if it picks
messages by the roles `query` and `document`; a reranker that answers with a token has the one of
Qwen3-Reranker else, and what has a head of its own gets the two texts one after the other, as the
tokenizer joins pairs.
"""

from __future__ import annotations

from octavo.engine.chat_template import ChatRenderer
from octavo.engine.tokenizer import Tokenizer
from octavo.errors import ChatTemplateError, RequestError
from octavo.models.pooling_spec import PoolingSpec

YES_NO_TEMPLATE = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n"
    '<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") '
    '| first | default("Given a web search query, retrieve relevant passages that answer the '
    'query") }}\n'
    '<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") '
    "| first }}\n"
    '<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") '
    "| first }}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n\n"
)
"""The prompt that Qwen3-Reranker was trained with (its model card); others of its kind bring theirs
as a chat template. Two line ends follow the thought: Jinja drops the last of a template."""
_PROBES = ("octavo-probe-one", "octavo-probe-two", "octavo-probe-three")


class PairWriter:
    """Writes the pairs of one model. May be called from threads."""

    def __init__(self, tokenizer: Tokenizer, spec: PoolingSpec) -> None:
        self._tokenizer = tokenizer
        self._renderer = _pair_renderer(tokenizer, spec)
        self._takes_instruction = self._renderer is not None and _reads_instruction(self._renderer)

    def check_instruction(self, instruction: str | None) -> None:
        """Raises RequestError if the model's pairs have no place for one."""
        if instruction is not None and not self._takes_instruction:
            message = (
                "instruction has no place in this model's pairs; put it into the query, or start "
                "the server with a --chat-template that reads the roles system, query and document"
            )
            raise RequestError(message, param="instruction")

    def ids(self, query: str, document: str, instruction: str | None = None) -> list[int]:
        """Returns the prompt's ids. Raises RequestError."""
        self.check_instruction(instruction)
        if self._renderer is None:
            return self._tokenizer.encode_pair(query, document)
        rendered = self._renderer.render(_messages(query, document, instruction))
        return self._tokenizer.encode_rendered(rendered)


def _messages(query: str, document: str, instruction: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    if instruction is not None:
        messages.insert(0, {"role": "system", "content": instruction})
    return messages


def _pair_renderer(tokenizer: Tokenizer, spec: PoolingSpec) -> ChatRenderer | None:
    if tokenizer.chat_template is not None and _picks_by_role(tokenizer.chat_renderer):
        return tokenizer.chat_renderer
    if spec.label_tokens:
        specials = tuple(tokenizer.special_strings)
        return ChatRenderer(YES_NO_TEMPLATE, tokenizer.special_tokens, specials)
    return None


def _picks_by_role(renderer: ChatRenderer) -> bool:
    """Whether a template knows a query and a document when it sees them: their order is nothing to
    it, and it writes both."""
    pair = _messages(*_PROBES[:2])
    try:
        text, turned = renderer.render(pair).shown, renderer.render(pair[::-1]).shown
    except ChatTemplateError:
        return False
    return text == turned and all(probe in text for probe in _PROBES[:2])


def _reads_instruction(renderer: ChatRenderer) -> bool:
    try:
        return _PROBES[2] in renderer.render(_messages(*_PROBES)).shown
    except ChatTemplateError:
        return False
