"""Fields of requests that others know: what is ignored here on purpose, what is refused and why.

Read by the server's models of bodies and by SamplingParams, so that both refuse the same in the
same words and drop nothing in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.errors import RequestError

Refused = Mapping[str, tuple[str, tuple[Any, ...]]]
"""By field: what to do instead, and the values that ask for nothing."""

IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "verbosity"),
        *("safety_identifier", "guided_decoding_backend"),
    }
)
"""OpenAI's fields that change nothing here, and the choice of a library that vLLM once had."""

_NO_TOOLS = "tools are for chats: POST /v1/chat/completions, or LLM.chat"
_OLD_TOOLS = "use tools and tool_choice in a chat"
_NO_SCHEMA = "use structured_outputs"
_NO_BEAMS = "there is no beam search; ask for n samples and choose"
_TEXT_ONLY = "the model reads and writes text only"
_ONE_DEVICE_GROUP = "the cache of this engine is not shared with others"
_NO_PLUGINS = "code of clients does not run here"

REFUSED: Refused = {
    # OpenAI's.
    "best_of": ("ask for n samples and choose", (1,)),
    "suffix": ("text is only continued, not filled in", ("",)),
    "tools": (_NO_TOOLS, ([],)),
    "tool_choice": (_NO_TOOLS, ("none", "auto")),
    "functions": (_OLD_TOOLS, ([],)),
    "function_call": (_OLD_TOOLS, ("none", "auto")),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "audio": (_TEXT_ONLY, ()),
    "web_search_options": ("the model cannot search the web", ()),
    "moderation": ("the server does not judge texts", ()),
    # vLLM's.
    "use_beam_search": (_NO_BEAMS, (False,)),
    "length_penalty": (_NO_BEAMS, (1, 1.0)),
    "early_stopping": (_NO_BEAMS, (False,)),
    "structural_tag": (_NO_SCHEMA, ()),
    "include_reasoning": ("reasoning is told from the text in chats alone", (True,)),
    "thinking_token_budget": ("reasoning is told from the text in chats alone", ()),
    "repetition_detection": ("use frequency_penalty or repetition_penalty", ()),
    "spaces_between_special_tokens": (
        "tokens are written as the tokenizer writes them, special ones among them",
        (True,),
    ),
    "prompt_embeds": ("send token ids or text", ()),
    "chat_template": ("a client may not bring a template; start the server with one", ()),
    "truncation_side": ("only the left side is cut", ("left",)),
    "logprob_token_ids": ("use logprobs", ([],)),
    "logits_processors": (_NO_PLUGINS, ([],)),
    "vllm_xargs": (_NO_PLUGINS, ({},)),
    "mm_processor_kwargs": (_TEXT_ONLY, ({},)),
    "media_io_kwargs": (_TEXT_ONLY, ({},)),
    "kv_transfer_params": (_ONE_DEVICE_GROUP, ({},)),
    "data_parallel_rank": (_ONE_DEVICE_GROUP, (0,)),
    # SGLang's and llama.cpp's.
    "regex": (_NO_SCHEMA, ()),
    "ebnf": (_NO_SCHEMA, ()),
    "json_schema": (_NO_SCHEMA, ()),
    "grammar": (_NO_SCHEMA, ("",)),
    "separate_reasoning": ("reasoning is told from the text in chats alone", (False,)),
    "lora_path": ("there are no adapters", ()),
    "mirostat": ("use temperature, top_p, top_k and min_p", (0,)),
    "typical_p": ("use temperature, top_p, top_k and min_p", (1, 1.0)),
    "num_ctx": ("the operator sets the context length", ()),
}
"""Known elsewhere, not here: what to do instead, and the values that ask for nothing."""

REFUSED_PARAMS: Refused = {
    **REFUSED,
    **dict.fromkeys(
        ("response_format", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        (_NO_SCHEMA, ()),
    ),
    **dict.fromkeys(("guided_decoding", "guided_whitespace_pattern"), (_NO_SCHEMA, ())),
    "truncate_prompt_tokens": ("cut the prompt's ids yourself", ()),
    "output_kind": ("an output is cumulative, and has what a step added as `deltas`", ()),
    "extra_args": (_NO_PLUGINS, ({},)),
    "flat_logprobs": ("log-probabilities come as one dict a position", (False,)),
    "skip_clone": ("parameters are always copied when they are used", (False,)),
}
"""The same for SamplingParams, with what only Python knows."""


REFUSED_ARGUMENTS: Refused = {
    **dict.fromkeys(
        ("lora_request", "prompt_adapter_request"), ("LoRA adapters are not built yet", ())
    ),
    "mm_processor_kwargs": REFUSED["mm_processor_kwargs"],
    "guided_options_request": (_NO_SCHEMA, ()),
    "data_parallel_rank": REFUSED["data_parallel_rank"],
    "tokenization_kwargs": ("give token ids", ({},)),
    "prompt_token_ids": ("give the ids as prompts", ()),
    "chat_template_content_format": ("templates get the text of a message", ("auto", "string")),
    "trace_headers": ("traces are not built yet", ({},)),
}
"""The same for the methods of LLM and AsyncLLM."""


def refuse_arguments(method: str, given: Mapping[str, Any]) -> None:
    """Raises RequestError for arguments of a method that are not supported or not known."""
    for name, value in given.items():
        if name not in REFUSED_ARGUMENTS:
            raise RequestError(f"{method} has no argument {name!r}", param=name)
        refuse_field(name, value, REFUSED_ARGUMENTS)


def refuse_field(name: str, value: object, refused: Refused, place: str = "") -> None:
    """Raises RequestError for a field of `refused`, unless its value asks for nothing."""
    reason, neutral = refused[name]
    # With their types: True equals 1.
    asks_nothing = any(type(value) is type(one) and value == one for one in neutral)
    if value is not None and not asks_nothing:
        message = f"{place}{name} is not supported: {reason}"
        raise RequestError(message, param=f"{place}{name}", code="unsupported_field")
