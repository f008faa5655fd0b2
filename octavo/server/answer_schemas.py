"""What answers look like, for the description of the API alone: JSON schemas by name.

Read by `openapi`; answers are made by the routes as plain dicts, and a test holds them to these.
"""

from __future__ import annotations

from typing import Any, get_args

from octavo.kv_cache.explain import Reason
from octavo.server.message_errors import TYPES

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_INT: Schema = {"type": "integer"}
_BOOL: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_IDS: Schema = {"type": "array", "items": _INT}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(fields: Schema, optional: Schema | None = None) -> Schema:
    """Returns the schema of an object that has all of `fields` and may have `optional` ones."""
    properties = {**fields, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": [*fields],
        "additionalProperties": False,
    }


_USAGE = _object(
    {
        "prompt_tokens": _INT,
        "completion_tokens": _INT,
        "total_tokens": _INT,
        "prompt_tokens_details": _object({"cached_tokens": _INT}),
    },
    {"completion_tokens_details": _object({"reasoning_tokens": _INT})},
)
_END: Schema = {
    "finish_reason": {"enum": ["stop", "length", "tool_calls", None]},
    "stop_reason": {
        "description": "The stop text or token that ended it.",
        "anyOf": [_TEXT, _INT, {"type": "null"}],
    },
}
_CHANCE: Schema = {"token": _TEXT, "logprob": _NUMBER, "bytes": _list(_INT)}
_CHAT_LOGPROBS = _object(
    {"content": _list(_object({**_CHANCE, "top_logprobs": _list(_object(_CHANCE))}))}
)
_PROMPT_LOGPROBS = _list(
    _or_null(
        {
            "description": "By token id.",
            "type": "object",
            "additionalProperties": _object(
                {"logprob": _NUMBER, "rank": _or_null(_INT), "decoded_token": _or_null(_TEXT)}
            ),
        }
    )
)
_COMPLETION_LOGPROBS = _object(
    {
        "tokens": _list(_TEXT),
        "token_logprobs": _list(_or_null(_NUMBER)),
        "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
        "text_offset": _list(_INT),
    }
)
_CALL = {
    "anyOf": [
        _object(
            {
                "id": _TEXT,
                "type": {"const": kind},
                kind: _object({"name": _TEXT, given: _TEXT}),
            }
        )
        for kind, given in (("function", "arguments"), ("custom", "input"))
    ]
}
_CHAT_CHOICE = _object(
    {
        "index": _INT,
        "message": _object(
            {
                "role": {"const": "assistant"},
                "content": _or_null(_TEXT),
                "refusal": {"type": "null"},
            },
            {"reasoning": _TEXT, "reasoning_content": _TEXT, "tool_calls": _list(_CALL)},
        ),
        "logprobs": _or_null(_CHAT_LOGPROBS),
        **_END,
    },
    {"token_ids": _IDS},
)
_TEXT_CHOICE = _object(
    {"index": _INT, "text": _TEXT, "logprobs": _or_null(_COMPLETION_LOGPROBS), **_END},
    {
        "token_ids": _IDS,
        "prompt_token_ids": _IDS,
        "prompt_logprobs": _or_null(_PROMPT_LOGPROBS),
    },
)
_MODEL = _object(
    {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": _INT,
        "owned_by": _TEXT,
        "root": _TEXT,
        "max_model_len": _INT,
    }
)


_BLOCK = {
    "anyOf": [
        _object({"type": {"const": "text"}, "text": _TEXT}),
        _object({"type": {"const": "thinking"}, "thinking": _TEXT, "signature": _TEXT}),
        _object(
            {
                "type": {"const": "tool_use"},
                "id": _TEXT,
                "name": _TEXT,
                "input": {"type": "object"},
            }
        ),
    ]
}
_STOP_REASONS = ("end_turn", "max_tokens", "stop_sequence", "tool_use")
_MESSAGE = _object(
    {
        "id": _TEXT,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": _TEXT,
        "content": _list(_BLOCK),
        "stop_reason": {"enum": [*_STOP_REASONS, "model_context_window_exceeded"]},
        "stop_sequence": _or_null(_TEXT),
        "usage": _object(
            {
                "input_tokens": _INT,
                "cache_creation_input_tokens": _INT,
                "cache_read_input_tokens": _INT,
                "output_tokens": _INT,
            },
            {"output_tokens_details": _object({"thinking_tokens": _INT})},
        ),
    }
)
_ANY: Schema = {"type": "object"}
_STATUS: Schema = {"enum": ["in_progress", "completed", "incomplete"]}


def _item(kind: str, fields: Schema, optional: Schema | None = None) -> Schema:
    """Returns the schema of a response's output item."""
    return _object({"id": _TEXT, "type": {"const": kind}, "status": _STATUS, **fields}, optional)


def _part(kind: str, fields: Schema | None = None) -> Schema:
    return _list(_object({"type": {"const": kind}, "text": _TEXT, **(fields or {})}))


_OUTPUT_ITEM = {
    "anyOf": [
        _item(
            "message",
            {
                "role": {"const": "assistant"},
                "content": _part(
                    "output_text",
                    {
                        "annotations": _list(_ANY),
                        "logprobs": _CHAT_LOGPROBS["properties"]["content"],
                    },
                ),
            },
        ),
        _item(
            "reasoning",
            {"summary": _list(_ANY), "content": _part("reasoning_text")},
            {"encrypted_content": _TEXT},
        ),
        _item("function_call", {"call_id": _TEXT, "name": _TEXT, "arguments": _TEXT}),
        _item("custom_tool_call", {"call_id": _TEXT, "name": _TEXT, "input": _TEXT}),
    ]
}
_RESPONSE_USAGE = _object(
    {
        "input_tokens": _INT,
        "input_tokens_details": _object({"cached_tokens": _INT, "cache_write_tokens": _INT}),
        "output_tokens": _INT,
        "output_tokens_details": _object({"reasoning_tokens": _INT}),
        "total_tokens": _INT,
    }
)
_RESPONSE = _object(
    {
        "id": _TEXT,
        "object": {"const": "response"},
        "created_at": _INT,
        "completed_at": _or_null(_INT),
        "status": {"enum": ["in_progress", "completed", "incomplete", "failed", "cancelled"]},
        "error": _or_null(_object({"code": _TEXT, "message": _TEXT})),
        "incomplete_details": _or_null(_object({"reason": _TEXT})),
        "background": {"type": "boolean"},
        "instructions": _or_null(_TEXT),
        "max_output_tokens": _or_null(_INT),
        "max_tool_calls": _or_null(_INT),
        "metadata": {"type": "object", "additionalProperties": _TEXT},
        "model": _TEXT,
        "output": _list(_OUTPUT_ITEM),
        "parallel_tool_calls": {"type": "boolean"},
        "previous_response_id": _or_null(_TEXT),
        "reasoning": _object({"effort": _or_null(_TEXT), "summary": _or_null(_TEXT)}),
        "service_tier": _TEXT,
        "store": {"type": "boolean"},
        "temperature": _NUMBER,
        "text": _object({"format": _ANY}, {"verbosity": _TEXT}),
        "tool_choice": {"anyOf": [_TEXT, _ANY]},
        "tools": _list(_ANY),
        "top_logprobs": _INT,
        "top_p": _NUMBER,
        "truncation": _TEXT,
        "usage": _or_null(_RESPONSE_USAGE),
    }
)


def _answer(kind: str, choice: Schema, optional: Schema | None = None) -> Schema:
    fields = {
        "id": _TEXT,
        "object": {"const": kind},
        "created": _INT,
        "model": _TEXT,
        "choices": _list(choice),
        "usage": _USAGE,
    }
    return _object(fields, optional)


def _page(items: Schema) -> Schema:
    """Returns the schema of one page of a list."""
    edges = {"first_id": _or_null(_TEXT), "last_id": _or_null(_TEXT), "has_more": _BOOL}
    return _object({"object": {"const": "list"}, "data": _list(items), **edges})


_BATCH_TIMES = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at"),
    *("expired_at", "cancelling_at", "cancelled_at"),
)
_BATCH_ERROR = _object(
    {"code": _TEXT, "message": _TEXT, "line": _or_null(_INT), "param": _or_null(_TEXT)}
)
_BATCH_STATUSES = (
    *("validating", "in_progress", "finalizing", "completed"),
    *("failed", "expired", "cancelling", "cancelled"),
)
_BATCH = _object(
    {
        "id": _TEXT,
        "object": {"const": "batch"},
        "endpoint": _TEXT,
        "model": _TEXT,
        "input_file_id": _TEXT,
        "completion_window": _TEXT,
        "status": {"enum": [*_BATCH_STATUSES]},
        "created_at": _INT,
        "expires_at": _INT,
        **dict.fromkeys(_BATCH_TIMES, _or_null(_INT)),
        "metadata": _or_null({"type": "object", "additionalProperties": _TEXT}),
        "output_file_id": _or_null(_TEXT),
        "error_file_id": _or_null(_TEXT),
        "errors": _or_null(_object({"object": {"const": "list"}, "data": _list(_BATCH_ERROR)})),
        "request_counts": _object({"total": _INT, "completed": _INT, "failed": _INT}),
    }
)
_FILE = _object(
    {
        "id": _TEXT,
        "object": {"const": "file"},
        "bytes": _INT,
        "created_at": _INT,
        "filename": _TEXT,
        "purpose": {"enum": ["batch", "batch_output"]},
        "status": {"const": "processed"},
    },
    {"expires_at": _INT},
)


_POOLED_USAGE = _object(
    {
        "prompt_tokens": _INT,
        "total_tokens": _INT,
        "prompt_tokens_details": _object({"cached_tokens": _INT}),
    }
)
_VECTOR = {"anyOf": [_list(_NUMBER), {"type": "string", "format": "byte"}]}


def _listed(kind: str, fields: Schema) -> Schema:
    item = _object({"object": {"const": kind}, "index": _INT, **fields})
    return _object(
        {
            "id": _TEXT,
            "object": {"const": "list"},
            "created": _INT,
            "model": _TEXT,
            "data": _list(item),
            "usage": _POOLED_USAGE,
        }
    )


ANSWERS: dict[str, Schema] = {
    "ChatCompletion": _answer(
        "chat.completion",
        _CHAT_CHOICE,
        {"prompt_logprobs": _or_null(_PROMPT_LOGPROBS), "prompt_token_ids": _IDS},
    ),
    "Completion": _answer("text_completion", _TEXT_CHOICE),
    "Message": _MESSAGE,
    "TokenCount": _object({"input_tokens": _INT}),
    "Invocation": {
        "anyOf": [
            {"$ref": "#/components/schemas/ChatCompletion"},
            {"$ref": "#/components/schemas/Completion"},
        ]
    },
    "PrefixExplanation": _object(
        {
            "object": {"const": "prefix_explanation"},
            "num_tokens": _INT,
            "cached_tokens": _INT,
            "block_size": _INT,
            "reason": {"enum": [*get_args(Reason)]},
            "message": _TEXT,
            "nearest": _or_null(_object({"num_tokens": _INT, "shared_tokens": _INT})),
            "parts_at": _or_null(
                _object(
                    {
                        "token": _INT,
                        "before": _or_null(_TEXT),
                        "prompt": _or_null(_TEXT),
                        "cached": _or_null(_TEXT),
                    }
                )
            ),
            "other_salt_tokens": _or_null(_INT),
        }
    ),
    "RenderedPrompt": _object({"text": _TEXT, "num_tokens": _INT, "token_ids": _IDS}),
    "RenderedPrompts": _object(
        {
            "object": {"const": "list"},
            "data": _list(_object({"num_tokens": _INT, "token_ids": _IDS})),
        }
    ),
    "Response": _RESPONSE,
    "ResponseDeleted": _object({"id": _TEXT, "object": {"const": "response"}, "deleted": _BOOL}),
    "ResponseItems": _page(_ANY),
    "Tokens": _object(
        {"count": _INT, "max_model_len": _INT, "tokens": _IDS}, {"token_strs": _list(_TEXT)}
    ),
    "Detokenized": _object({"prompt": _TEXT}),
    "Embeddings": _listed("embedding", {"embedding": _VECTOR}),
    "Pooled": _listed("pooling", {"data": _VECTOR}),
    "Scores": _listed("score", {"score": _NUMBER}),
    "Reranked": _object(
        {
            "id": _TEXT,
            "model": _TEXT,
            "usage": _POOLED_USAGE,
            "results": _list(
                _object(
                    {"index": _INT, "relevance_score": _NUMBER},
                    {"document": _object({"text": _TEXT})},
                )
            ),
        }
    ),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": _list(_MODEL)}),
    "Batch": _BATCH,
    "Batches": _page(_BATCH),
    "File": _FILE,
    "Files": _page(_FILE),
    "FileDeleted": _object({"id": _TEXT, "object": {"const": "file"}, "deleted": _BOOL}),
    "Status": _object({"status": _TEXT}),
    "Version": _object({"version": _TEXT}),
    "MessageError": _object(
        {
            "type": {"const": "error"},
            "error": _object({"type": {"enum": [*TYPES]}, "message": _TEXT}),
            "request_id": _TEXT,
        }
    ),
    "Error": _object(
        {
            "error": _object(
                {
                    "message": _TEXT,
                    "type": {"enum": ["invalid_request_error", "server_error"]},
                    "param": {**_or_null(_TEXT), "description": "The field that is wrong."},
                    "code": _or_null(_TEXT),
                }
            )
        }
    ),
}
