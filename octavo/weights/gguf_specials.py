"""Which tokens of a GGUF vocabulary have a role, and which of them end a turn. No torch.

Called by `gguf_config` and `gguf_tokenizer`, which must agree. Never reads tensors. What a file
leaves out is what llama.cpp takes for it: ids of the tokenizer's kind, ends of turns by their text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

ROLE_KEYS = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "eot_token": "eot",
    "eom_token": "eom",
}
"""Role -> the middle of its key, tokenizer.ggml.*_token_id."""
_SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
"""Of tokenizer.ggml.model "llama", where the file has no key."""
END_TEXTS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|eom_id|>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
    }
)
"""Tokens that end a model's turn, in whatever vocabulary they are: files often name one alone."""
_MESSAGE_ENDS = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"})
"""Where a vocabulary has both of a pair, <|end|> ends a message within the turn."""


def special_ids(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids of the roles that the vocabulary has. Ids that are no token's count as
    absent, where there is a vocabulary."""
    tokens = vocabulary(metadata)
    end = len(tokens) or 2**31
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    found: dict[str, int] = {}
    for role, key in ROLE_KEYS.items():
        default = _SENTENCEPIECE_IDS.get(role) if is_sentencepiece else None
        given = metadata.get(f"tokenizer.ggml.{key}_token_id")
        for index in (given, default):
            if isinstance(index, int) and 0 <= index < end:
                found[role] = index
                break
    return found


def end_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Returns every id that ends a sequence: those with a key, eos first, then those by text."""
    special = special_ids(metadata)
    keyed = [special[role] for role in ("eos_token", "eot_token", "eom_token") if role in special]
    texts = {text: index for index, text in enumerate(vocabulary(metadata)) if text in END_TEXTS}
    if any(pair <= texts.keys() for pair in _MESSAGE_ENDS):
        texts.pop("<|end|>", None)
    if "<|tool_response>" in texts:
        texts.pop("</s>", None)
    return list(dict.fromkeys([*keyed, *texts.values()]))


def vocabulary(metadata: Mapping[str, Any]) -> Sequence[str]:
    """Returns the tokens' texts in order; none where the file has no tokenizer."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return tokens if isinstance(tokens, list) else []
