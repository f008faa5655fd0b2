"""What answers look like, for the description of the API alone: JSON schemas by name.

Read by `openapi`; answers are made by the routes as plain dicts, and a test holds them to these.
"""

from __future__ import annotations

from typing import get_args

from octavo.kv_cache.explain import Reason
from octavo.server.message_errors import TYPES
from octavo.server.response_schemas import RESPONSE
from octavo.server.schema_words import (
    ANY_OBJECT,
    BOOL,
    CHAT_LOGPROBS,
    IDS,
    INT,
    NUMBER,
    TEXT,
    Schema,
    list_of,
    object_of,
    or_null,
)

_USAGE = object_of(
    {
        "prompt_tokens": INT,
        "completion_tokens": INT,
        "total_tokens": INT,
        "prompt_tokens_details": object_of({"cached_tokens": INT}),
    },
    {"completion_tokens_details": object_of({"reasoning_tokens": INT})},
)
_END: Schema = {
    "finish_reason": {"enum": ["stop", "length", "tool_calls", "content_filter", None]},
    "stop_reason": {
        "description": "The stop text or token that ended it, or why the guard did.",
        "anyOf": [TEXT, INT, {"type": "null"}],
    },
}
_PROMPT_LOGPROBS = list_of(
    or_null(
        {
            "description": "By token id.",
            "type": "object",
            "additionalProperties": object_of(
                {"logprob": NUMBER, "rank": or_null(INT), "decoded_token": or_null(TEXT)}
            ),
        }
    )
)
_COMPLETION_LOGPROBS = object_of(
    {
        "tokens": list_of(TEXT),
        "token_logprobs": list_of(or_null(NUMBER)),
        "top_logprobs": list_of(or_null({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": list_of(INT),
    }
)
_CALL = {
    "anyOf": [
        object_of(
            {
                "id": TEXT,
                "type": {"const": kind},
                kind: object_of({"name": TEXT, given: TEXT}),
            }
        )
        for kind, given in (("function", "arguments"), ("custom", "input"))
    ]
}
_CHAT_CHOICE = object_of(
    {
        "index": INT,
        "message": object_of(
            {
                "role": {"const": "assistant"},
                "content": or_null(TEXT),
                "refusal": {"type": "null"},
            },
            {"reasoning": TEXT, "reasoning_content": TEXT, "tool_calls": list_of(_CALL)},
        ),
        "logprobs": or_null(CHAT_LOGPROBS),
        **_END,
    },
    {"token_ids": IDS},
)
_TEXT_CHOICE = object_of(
    {"index": INT, "text": TEXT, "logprobs": or_null(_COMPLETION_LOGPROBS), **_END},
    {
        "token_ids": IDS,
        "prompt_token_ids": IDS,
        "prompt_logprobs": or_null(_PROMPT_LOGPROBS),
    },
)
_MODEL = object_of(
    {
        "id": TEXT,
        "object": {"const": "model"},
        "created": INT,
        "owned_by": TEXT,
        "root": TEXT,
        "max_model_len": INT,
    }
)


_BLOCK = {
    "anyOf": [
        object_of({"type": {"const": "text"}, "text": TEXT}),
        object_of({"type": {"const": "thinking"}, "thinking": TEXT, "signature": TEXT}),
        object_of(
            {
                "type": {"const": "tool_use"},
                "id": TEXT,
                "name": TEXT,
                "input": {"type": "object"},
            }
        ),
    ]
}
_STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal")
_MESSAGE = object_of(
    {
        "id": TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": TEXT,
        "content": list_of(_BLOCK),
        "stop_reason": {"enum": [*_STOP_REASONS, "model_context_window_exceeded"]},
        "stop_sequence": or_null(TEXT),
        "usage": object_of(
            {
                "input_tokens": INT,
                "cache_creation_input_tokens": INT,
                "cache_read_input_tokens": INT,
                "output_tokens": INT,
            },
            {"output_tokens_details": object_of({"thinking_tokens": INT})},
        ),
    }
)


def _answer(kind: str, choice: Schema, optional: Schema | None = None) -> Schema:
    fields = {
        "id": TEXT,
        "object": {"const": kind},
        "created": INT,
        "model": TEXT,
        "choices": list_of(choice),
        "usage": _USAGE,
    }
    return object_of(fields, optional)


def _page(items: Schema) -> Schema:
    """Returns the schema of one page of a list."""
    edges = {"first_id": or_null(TEXT), "last_id": or_null(TEXT), "has_more": BOOL}
    return object_of({"object": {"const": "list"}, "data": list_of(items), **edges})


_BATCH_TIMES = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)
_BATCH_ERROR = object_of(
    {"code": TEXT, "message": TEXT, "line": or_null(INT), "param": or_null(TEXT)}
)
_BATCH_STATUSES = (
    *("validating", "in_progress", "finalizing", "completed"),
    *("failed", "expired", "cancelling", "cancelled"),
)
_BATCH = object_of(
    {
        "id": TEXT,
        "object": {"const": "batch"},
        "endpoint": TEXT,
        "model": TEXT,
        "input_file_id": TEXT,
        "completion_window": TEXT,
        "status": {"enum": [*_BATCH_STATUSES]},
        "created_at": INT,
        "expires_at": INT,
        **dict.fromkeys(_BATCH_TIMES, or_null(INT)),
        "metadata": or_null({"type": "object", "additionalProperties": TEXT}),
        "output_file_id": or_null(TEXT),
        "error_file_id": or_null(TEXT),
        "errors": or_null(object_of({"object": {"const": "list"}, "data": list_of(_BATCH_ERROR)})),
        "request_counts": object_of({"total": INT, "completed": INT, "failed": INT}),
    }
)
_FILE = object_of(
    {
        "id": TEXT,
        "object": {"const": "file"},
        "bytes": INT,
        "created_at": INT,
        "filename": TEXT,
        "purpose": {"enum": ["batch", "batch_output"]},
        "status": {"const": "processed"},
    },
    {"expires_at": INT},
)


_POOLED_USAGE = object_of(
    {
        "prompt_tokens": INT,
        "total_tokens": INT,
        "prompt_tokens_details": object_of({"cached_tokens": INT}),
    }
)
_VECTOR = {"anyOf": [list_of(NUMBER), {"type": "string", "format": "byte"}]}


def _listed(kind: str, fields: Schema) -> Schema:
    item = object_of({"object": {"const": kind}, "index": INT, **fields})
    return object_of(
        {
            "id": TEXT,
            "object": {"const": "list"},
            "created": INT,
            "model": TEXT,
            "data": list_of(item),
            "usage": _POOLED_USAGE,
        }
    )


ANSWERS: dict[str, Schema] = {
    "ChatCompletion": _answer(
        "chat.completion",
        _CHAT_CHOICE,
        {"prompt_logprobs": or_null(_PROMPT_LOGPROBS), "prompt_token_ids": IDS},
    ),
    "Completion": _answer("text_completion", _TEXT_CHOICE),
    "Message": _MESSAGE,
    "TokenCount": object_of({"input_tokens": INT}),
    "Invocation": {
        "anyOf": [
            {"$ref": "#/components/schemas/ChatCompletion"},
            {"$ref": "#/components/schemas/Completion"},
        ]
    },
    "PrefixExplanation": object_of(
        {
            "object": {"const": "prefix_explanation"},
            "num_tokens": INT,
            "cached_tokens": INT,
            "block_size": INT,
            "reason": {"enum": [*get_args(Reason)]},
            "message": TEXT,
            "nearest": or_null(object_of({"num_tokens": INT, "shared_tokens": INT})),
            "parts_at": or_null(
                object_of(
                    {
                        "token": INT,
                        "before": or_null(TEXT),
                        "prompt": or_null(TEXT),
                        "cached": or_null(TEXT),
                    }
                )
            ),
            "other_salt_tokens": or_null(INT),
        }
    ),
    "RenderedPrompt": object_of({"text": TEXT, "num_tokens": INT, "token_ids": IDS}),
    "RenderedPrompts": object_of(
        {
            "object": {"const": "list"},
            "data": list_of(object_of({"num_tokens": INT, "token_ids": IDS})),
        }
    ),
    "Response": RESPONSE,
    "ResponseDeleted": object_of({"id": TEXT, "object": {"const": "response"}, "deleted": BOOL}),
    "ResponseItems": _page(ANY_OBJECT),
    "Tokens": object_of(
        {"count": INT, "max_model_len": INT, "tokens": IDS}, {"token_strs": list_of(TEXT)}
    ),
    "Detokenized": object_of({"prompt": TEXT}),
    "Embeddings": _listed("embedding", {"embedding": _VECTOR}),
    "Pooled": _listed("pooling", {"data": _VECTOR}),
    "Scores": _listed("score", {"score": NUMBER}),
    "Reranked": object_of(
        {
            "id": TEXT,
            "model": TEXT,
            "usage": _POOLED_USAGE,
            "results": list_of(
                object_of(
                    {"index": INT, "relevance_score": NUMBER},
                    {"document": object_of({"text": TEXT})},
                )
            ),
        }
    ),
    "Model": _MODEL,
    "Models": object_of({"object": {"const": "list"}, "data": list_of(_MODEL)}),
    "Batch": _BATCH,
    "Batches": _page(_BATCH),
    "File": _FILE,
    "Files": _page(_FILE),
    "FileDeleted": object_of({"id": TEXT, "object": {"const": "file"}, "deleted": BOOL}),
    "Status": object_of({"status": TEXT}),
    "Version": object_of({"version": TEXT}),
    "MessageError": object_of(
        {
            "type": {"const": "error"},
            "error": object_of({"type": {"enum": [*TYPES]}, "message": TEXT}),
            "request_id": TEXT,
        }
    ),
    "Error": object_of(
        {
            "error": object_of(
                {
                    "message": TEXT,
                    "type": {"enum": ["invalid_request_error", "server_error"]},
                    "param": {**or_null(TEXT), "description": "The field that is wrong."},
                    "code": or_null(TEXT),
                }
            )
        }
    ),
}
