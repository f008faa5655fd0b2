"""What the files beside tokenizer.json say, and how it is put into the tokenizer.

Called by `tokenizer` as it is made. Files of all ages are read; two that contradict each other are
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from octavo.errors import ModelError
from octavo.weights.checkpoint import read_json, read_text
from octavo.weights.gguf_tokenizer import ends_template

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "eot_token")
_KEEPING_NORMALIZERS = frozenset({"Replace", "Prepend", "NFC", "Lowercase", "ByteLevel"})
"""Normalizers after which a text is about as long as before; `Replace` is used for spaces."""


def folder_config(folder: Path) -> dict[str, Any]:
    """Returns what a folder's files say beside tokenizer.json: tokenizer_config.json, with the map
    of special tokens and the chat template that lie apart."""
    config = {
        **(read_json(folder / "special_tokens_map.json") or {}),
        **(read_json(folder / "tokenizer_config.json") or {}),
    }
    # As in transformers, tokenizer.json alone says whether BOS and EOS are added.
    ends = False if _drops_post_processor(folder, config) else None
    config |= {"add_bos_token": ends, "add_eos_token": ends}
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = read_text(template)
    elif (old := read_json(folder / "chat_template.json")) and "chat_template" not in config:
        config["chat_template"] = old.get("chat_template")
    return config


def _drops_post_processor(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the tokenizer's class in transformers makes its own post-processor, of no tokens."""
    name = config.get("tokenizer_class")
    if name is None and (folder / "config.json").is_file():
        is_olmoe = (read_json(folder / "config.json") or {}).get("model_type") == "olmoe"
        name = "GPTNeoXTokenizer" if is_olmoe else None
    return str(name).removesuffix("Fast") == "GPTNeoXTokenizer"


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the special tokens by role; old files wrap them in an object."""
    found: dict[str, str] = {}
    for role in _ROLES:
        value = config.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            found[role] = text
    return found


def add_missing_tokens(core: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Adds the tokens that only tokenizer_config.json knows, at the ids it says."""
    known = core.get_added_tokens_decoder()
    listed: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    for key, spec in sorted(listed.items(), key=lambda item: int(item[0])):
        if int(key) in known:
            continue
        names = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {name: bool(spec.get(name, False)) for name in names}
        core.add_tokens([tokenizers.AddedToken(spec["content"], **flags)])
        if core.token_to_id(spec["content"]) != int(key):
            raise ModelError(
                f"tokenizer_config.json puts {spec['content']!r} at id {key}, tokenizer.json at "
                f"{core.token_to_id(spec['content'])}; the two files do not belong together"
            )


def apply_bos_eos(
    core: tokenizers.Tokenizer, config: Mapping[str, Any], special: Mapping[str, str]
) -> None:
    """Lets add_bos_token and add_eos_token rule over tokenizer.json, each where it is given: absent
    and null leave what tokenizer.json does."""
    given = {role: config.get(f"add_{role}_token") for role in ("bos", "eos")}
    if given == {"bos": None, "eos": None}:
        return
    added = core.encode("a", add_special_tokens=True).special_tokens_mask
    is_added = {"bos": added[:1] == [1], "eos": added[-1:] == [1]}
    tokens: dict[str, str | None] = {}
    for role, flag in given.items():
        wanted = is_added[role] if flag is None else bool(flag)
        tokens[role] = special.get(f"{role}_token") if wanted else None
    core.post_processor = ends_template(tokens["bos"], tokens["eos"], core.token_to_id)


def chat_template(config: Mapping[str, Any]) -> str | None:
    """Returns the template called default, or the only one."""
    given = config.get("chat_template")
    if not isinstance(given, list):
        return given
    named = {entry["name"]: entry["template"] for entry in given}
    return named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)


def longest_spelling(core: tokenizers.Tokenizer) -> int | None:
    """Returns how many characters of a text one token stands for at most, None if any number.

    Where normalising may drop characters, or unknown ones become one token together, no length
    of a text says that its tokens are too many.
    """
    data = json.loads(core.to_str())
    normalizer, model = data["normalizer"], data["model"]
    steps = [normalizer] if normalizer is not None else []
    while any(step["type"] == "Sequence" for step in steps):
        steps = [
            inner
            for step in steps
            for inner in (step["normalizers"] if step["type"] == "Sequence" else [step])
        ]
    keeps_length = all(step["type"] in _KEEPING_NORMALIZERS for step in steps)
    has_unknown = model.get("unk_token") or model.get("unk_id") is not None
    if not keeps_length or (has_unknown and not model.get("byte_fallback")):
        return None
    return max(map(len, core.get_vocab(with_added_tokens=True)), default=1)
