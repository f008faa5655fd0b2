"""What a response of the Responses API looks like, for the description of the API alone.

Read by `answer_schemas`.
"""

from __future__ import annotations

from octavo.server.schema_words import (
    ANY_OBJECT,
    CHAT_LOGPROBS,
    INT,
    NUMBER,
    TEXT,
    Schema,
    list_of,
    object_of,
    or_null,
)

_STATUS: Schema = {"enum": ["in_progress", "completed", "incomplete"]}


def _item(kind: str, fields: Schema, optional: Schema | None = None) -> Schema:
    """Returns the schema of a response's output item."""
    return object_of({"id": TEXT, "type": {"const": kind}, "status": _STATUS, **fields}, optional)


def _part(kind: str, fields: Schema | None = None) -> Schema:
    return list_of(object_of({"type": {"const": kind}, "text": TEXT, **(fields or {})}))


_OUTPUT_ITEM = {
    "anyOf": [
        _item(
            "message",
            {
                "role": {"const": "assistant"},
                "content": _part(
                    "output_text",
                    {
                        "annotations": list_of(ANY_OBJECT),
                        "logprobs": CHAT_LOGPROBS["properties"]["content"],
                    },
                ),
            },
        ),
        _item(
            "reasoning",
            {"summary": list_of(ANY_OBJECT), "content": _part("reasoning_text")},
            {"encrypted_content": TEXT},
        ),
        _item("function_call", {"call_id": TEXT, "name": TEXT, "arguments": TEXT}),
        _item("custom_tool_call", {"call_id": TEXT, "name": TEXT, "input": TEXT}),
    ]
}
_RESPONSE_USAGE = object_of(
    {
        "input_tokens": INT,
        "input_tokens_details": object_of({"cached_tokens": INT, "cache_write_tokens": INT}),
        "output_tokens": INT,
        "output_tokens_details": object_of({"reasoning_tokens": INT}),
        "total_tokens": INT,
    }
)
RESPONSE = object_of(
    {
        "id": TEXT,
        "object": {"const": "response"},
        "created_at": INT,
        "completed_at": or_null(INT),
        "status": {"enum": ["in_progress", "completed", "incomplete", "failed", "cancelled"]},
        "error": or_null(object_of({"code": TEXT, "message": TEXT})),
        "incomplete_details": or_null(object_of({"reason": TEXT})),
        "background": {"type": "boolean"},
        "instructions": or_null(TEXT),
        "max_output_tokens": or_null(INT),
        "max_tool_calls": or_null(INT),
        "metadata": {"type": "object", "additionalProperties": TEXT},
        "model": TEXT,
        "output": list_of(_OUTPUT_ITEM),
        "parallel_tool_calls": {"type": "boolean"},
        "previous_response_id": or_null(TEXT),
        "reasoning": object_of({"effort": or_null(TEXT), "summary": or_null(TEXT)}),
        "service_tier": TEXT,
        "store": {"type": "boolean"},
        "temperature": NUMBER,
        "text": object_of({"format": ANY_OBJECT}, {"verbosity": TEXT}),
        "tool_choice": {"anyOf": [TEXT, ANY_OBJECT]},
        "tools": list_of(ANY_OBJECT),
        "top_logprobs": INT,
        "top_p": NUMBER,
        "truncation": TEXT,
        "usage": or_null(_RESPONSE_USAGE),
    }
)
