"""The bodies of POST /v1/embeddings, /pooling, /v1/score and /v1/rerank.

Parsed for `routes.embeddings` and `routes.scores`; never touches the engine.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from octavo.errors import RequestError, shown
from octavo.pooling import PoolingParams
from octavo.request import PrefixCaching
from octavo.request_fields import Refused
from octavo.request_limits import MAX_INT
from octavo.server.protocol.completions import check_prompt
from octavo.server.protocol.strict import (
    PackedIds,
    Priority,
    RequestModel,
    Text,
    TokenId,
    integer,
)

MAX_TEXTS = 2048
"""Texts, or pairs of them, in one call: OpenAI's limit."""

Encoding = Literal["float", "base64"]
_Ids = Annotated[list[TokenId], Field(min_length=1)]
_Many = Annotated[list[Text] | list[_Ids], Field(min_length=1, max_length=MAX_TEXTS)]
Input = Annotated[
    str | list[str] | PackedIds | list[PackedIds],
    PlainValidator(
        lambda given: check_prompt(given, "input", MAX_TEXTS),
        json_schema_input_type=Text | _Ids | _Many,
    ),
]
Texts = Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]
_NO_IMAGES = "the model reads text only"
_REFUSED: Refused = {
    "truncation_side": ("texts are cut at their end", ("right",)),
    "softmax": ("use use_activation", ()),
    "activation": ("use use_activation", ()),
    "normalize": ("use use_activation", ()),
    "messages": ("send input", ()),
    "mm_processor_kwargs": (_NO_IMAGES, ({},)),
    "media_io_kwargs": (_NO_IMAGES, ({},)),
    "embed_dtype": ("numbers are float32", ("float32",)),
    "endianness": ("numbers are little-endian", ("native", "little")),
}

_REFUSED_DOCUMENTS: Refused = {
    **_REFUSED,
    "max_tokens_per_doc": ("documents are read whole; cut them yourself", ()),
}


class PoolingFields(RequestModel):
    """What all calls for vectors and scores share."""

    ignored_fields = frozenset({"user"})
    refused_fields = _REFUSED

    use_activation: bool | None = Field(
        None,
        description="false: embeddings are not normalised, and scores are logits. null: as the "
        "model says.",
    )
    truncate_prompt_tokens: int | None = integer(
        "Cut longer texts to so many tokens, at their end; -1: to the model's context.", -1
    )
    priority: Priority = Field(
        0, description="Lower runs first; what is allowed besides 0 is the operator's choice."
    )
    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")] | None = Field(
        None, description="Becomes part of the answer's id, before the header X-Request-Id."
    )
    cache_salt: Annotated[str, Field(max_length=1024)] = Field(
        "", description="Requests share computed prefixes only with those of the same salt."
    )
    prefix_caching: PrefixCaching | None = Field(
        None, description='Share computed prefixes; "off" neither reads nor writes the cache.'
    )

    def params(self) -> PoolingParams:
        """Returns how vectors are told. Raises RequestError."""
        return PoolingParams(use_activation=self.use_activation)

    def limit(self, max_model_len: int) -> int | None:
        """Returns the tokens that longer texts are cut to. Raises RequestError."""
        wanted = self.truncate_prompt_tokens
        if wanted is None or wanted == -1:
            return None if wanted is None else max_model_len
        if not 1 <= wanted <= MAX_INT:
            message = f"truncate_prompt_tokens must be -1 or in 1..{MAX_INT}, got {shown(wanted)}"
            raise RequestError(message, param="truncate_prompt_tokens")
        return wanted


class InputFields(PoolingFields):
    """Texts, or their ids."""

    # Ids are looked through at C's speed, twenty a microsecond.
    max_quick_values = 32 * 1024

    input: Input = Field(description="A text, token ids, or a list of one of them.")
    encoding_format: Encoding = Field(
        "float", description="Numbers, or the bytes of float32 in base64."
    )
    dimensions: int | None = integer(
        "Numbers of each vector, of models that were trained for fewer.", 1
    )
    add_special_tokens: bool = Field(
        True, description="Put around a text what the model wants around texts."
    )

    def field_name(self, param: str) -> str:
        return "input" if param == "prompt" else param

    def params(self) -> PoolingParams:
        return PoolingParams(dimensions=self.dimensions, use_activation=self.use_activation)

    def inputs(self) -> list[str | PackedIds]:
        """Returns each text, or its ids. Raises RequestError naming one that is empty."""
        given = [*self.input] if isinstance(self.input, list) else [self.input]
        for place, one in enumerate(given):
            if not one:
                where = f"input[{place}]" if isinstance(self.input, list) else "input"
                message = f"{where} is empty; send at least one token"
                raise RequestError(message, param="input")
        if not given:
            raise RequestError("input is an empty list; send at least one text", param="input")
        return given


class EmbeddingRequest(InputFields):
    """OpenAI's request for embeddings, with vLLM's additions."""


class PoolingRequest(InputFields):
    """vLLM's request for whatever a model makes of texts."""

    task: Literal["embed", "classify", "score"] | None = Field(
        None, description="What is expected of the model; another one refuses."
    )


def _check_texts(given: object, name: str) -> object:
    if isinstance(given, str):
        return given
    if not isinstance(given, list) or set(map(type, given)) - {str}:
        raise RequestError(f"{name} must be a text or a list of texts", param=name)
    if len(given) > MAX_TEXTS:
        message = f"{name} holds {len(given)} texts; at most {MAX_TEXTS} fit in one call"
        raise RequestError(message, param=name)
    return given


def _texts(name: str) -> Any:
    return PlainValidator(
        lambda given: _check_texts(given, name), json_schema_input_type=Text | Texts
    )


class ScoreRequest(PoolingFields):
    """vLLM's request for the scores of pairs: one text with each of several, or two lists."""

    max_quick_values = 32 * 1024

    text_1: Annotated[str | list[str], _texts("text_1")] = Field(
        description="The query, or one for each document."
    )
    text_2: Annotated[str | list[str], _texts("text_2")] = Field(description="The documents.")
    instruction: str | None = Field(
        None, description="What makes a document relevant, for rerankers that are told."
    )


def _document_text(given: object, place: int) -> str:
    if isinstance(given, dict) and set(given) == {"text"}:
        given = given["text"]
    if not isinstance(given, str):
        message = f"documents[{place}] must be a text, or an object with text alone"
        raise RequestError(message, param="documents")
    return given


def _check_documents(given: object) -> object:
    if not isinstance(given, list):
        raise RequestError("documents must be a list of texts", param="documents")
    if not 1 <= len(given) <= MAX_TEXTS:
        message = f"documents holds {len(given)} texts; send 1 to {MAX_TEXTS}"
        raise RequestError(message, param="documents")
    return [_document_text(one, place) for place, one in enumerate(given)]


Documents = Annotated[
    list[str],
    PlainValidator(_check_documents, json_schema_input_type=Texts),
]


class RerankRequest(PoolingFields):
    """Jina's and Cohere's request for documents in order of relevance."""

    max_quick_values = 32 * 1024
    refused_fields = _REFUSED_DOCUMENTS

    query: Text = Field(description="What is looked for.")
    documents: Documents = Field(
        description="The texts to choose from, or objects with text alone."
    )
    top_n: int | None = integer("Results at most; 0 and null: all.", 0)
    return_documents: bool = Field(True, description="Repeat each document in its result.")
    instruction: str | None = Field(
        None, description="What makes a document relevant, for rerankers that are told."
    )

    @property
    def most(self) -> int | None:
        """Results at most; None: all. Raises RequestError."""
        wanted = self.top_n
        if wanted is not None and not 0 <= wanted <= MAX_INT:
            message = f"top_n must be in 0..{MAX_INT}, got {shown(wanted)}"
            raise RequestError(message, param="top_n")
        return wanted or None
