"""Owns the way from a GGUF file's vocabulary to the three tokenizer files of Hugging Face.

Called by `engine.tokenizer` and by the demo writer, which puts the texts beside its weights. Never
reads tensors, and never guesses: an unknown pre-tokenizer is an error that lists the known ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import processors

from octavo.errors import UnsupportedModelError, WeightsError
from octavo.weights.gguf_file import read_gguf
from octavo.weights.gguf_pretokenizers import PRE_TOKENIZERS
from octavo.weights.gguf_specials import end_ids, special_ids

# Token types of ggml.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def tokenizer_files_from_gguf(path: str | Path) -> dict[str, str]:
    """Returns the JSON texts of tokenizer.json, tokenizer_config.json, special_tokens_map.json.

    Raises UnsupportedModelError for tokenizers and pre-tokenizers that are not known, WeightsError
    for a broken file.
    """
    meta = read_gguf(Path(path)).metadata
    kind = meta.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.model is {kind!r}; known are gpt2 (byte-level BPE) and llama "
            "(SentencePiece); give a folder with tokenizer.json as the tokenizer instead"
        )
    tokens = _list_of(path, meta, "tokens", str, None)
    types = _token_types(_list_of(path, meta, "token_type", int, [NORMAL] * len(tokens)), meta)
    if kind == "gpt2":
        parts, add_bos = _byte_level_bpe(path, meta, tokens, types)
    else:
        parts, add_bos = _sentencepiece(path, meta, tokens, types), True
    special = {role: tokens[index] for role, index in special_ids(meta).items()}
    add_bos = bool(meta.get("tokenizer.ggml.add_bos_token", add_bos)) and "bos_token" in special
    add_eos = bool(meta.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in special
    bos, eos = special["bos_token"] if add_bos else None, special["eos_token"] if add_eos else None
    # What tokenizers pickles of its parts is their JSON.
    ends = json.loads(ends_template(bos, eos, tokens.index).__getstate__())
    head = {"version": "1.0", "truncation": None, "padding": None}
    head["added_tokens"] = _added_tokens(tokens, types, special)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": kind == "llama" and _has_dummy_prefix(meta),
        **special,
        **_chat_template(meta),
    }
    config["model_max_length"] = meta.get(
        f"{meta.get('general.architecture')}.context_length", 10**30
    )
    named = {key: text for key, text in special.items() if key[:3] not in ("eot", "eom")}
    return {
        "tokenizer.json": json.dumps({**head, **parts, "post_processor": ends}, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False, indent=2),
        "special_tokens_map.json": json.dumps(named, ensure_ascii=False, indent=2),
    }


def _byte_level_bpe(
    path: str | Path, meta: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, Any], bool]:
    """Returns the parts of tokenizer.json for a GPT-2 like vocabulary, and whether BOS leads."""
    name = meta.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise UnsupportedModelError(
            f"{path}: tokenizer.ggml.pre {name!r} is unknown; known are "
            f"{', '.join(PRE_TOKENIZERS)}; give a folder with tokenizer.json as the tokenizer"
        )
    spelling = byte_spelling()
    alphabet = frozenset(spelling)
    vocab: dict[str, int] = {}
    for index, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind not in (CONTROL, USER_DEFINED) and not alphabet.issuperset(token):
            # A plain token that is spelt as text: some converters forget the byte alphabet.
            token = "".join(spelling[byte] for byte in token.encode())
        vocab.setdefault(token, index)
    bytes_step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    steps = [*pre.steps(), {**bytes_step, "use_regex": not pre.splits}]
    merges = [merge.split(" ", 1) for merge in _list_of(path, meta, "merges", str, None)]
    parts = {
        "normalizer": {"type": "NFC"} if pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": {**bytes_step, "use_regex": False},
        "model": _bpe(vocab, merges, ignore_merges=pre.ignore_merges),
    }
    return parts, pre.add_bos


def _sentencepiece(
    path: str | Path, meta: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> dict[str, Any]:
    """Returns the parts of tokenizer.json for a SentencePiece BPE vocabulary with scores.

    SentencePiece joins the neighbours whose union scores best; listing every pair that makes a
    token, best union first, gives a merge table with the same result.
    """
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    prefix = _has_dummy_prefix(meta)
    unknown = special_ids(meta).get("unk_token")
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Metaspace",
            "replacement": "\u2581",
            "prepend_scheme": "first" if prefix else "never",
            "split": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": _bpe(
            vocab,
            _merges_by_score(vocab, _list_of(path, meta, "scores", (int, float), None), types),
            fuse_unk=True,
            byte_fallback=True,
            unk_token=None if unknown is None else tokens[unknown],
        ),
    }


def _merges_by_score(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[list[str]]:
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for token, index in vocab.items():
        if types[index] in (UNKNOWN, CONTROL):  # never built from text
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], -cut, cut - len(token), index, left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _bpe(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    defaults = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    defaults |= {"dropout": None, "unk_token": None}
    defaults |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {"type": "BPE", **defaults, **options, "vocab": vocab, "merges": merges}


def _has_dummy_prefix(meta: Mapping[str, Any]) -> bool:
    """Whether SentencePiece puts a space before every text, whatever that begins with."""
    return bool(meta.get("tokenizer.ggml.add_space_prefix", True))


def _list_of(
    path: str | Path, meta: Mapping[str, Any], key: str, kind: Any, default: list[Any] | None
) -> list[Any]:
    """Returns a list of the vocabulary; `default` where the file may leave it out."""
    name = f"tokenizer.ggml.{key}"
    value = meta.get(name, default)
    if value is None:
        raise WeightsError(
            f"{path}: {name} is missing; convert the model again, or give a folder with "
            "tokenizer.json as the tokenizer"
        )
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        raise WeightsError(f"{path}: {name} must be a list of {kind}, got {str(value)[:50]}")
    if key != "merges" and len(value) != len(meta["tokenizer.ggml.tokens"]):
        raise WeightsError(
            f"{path}: {name} has {len(value)} entries for "
            f"{len(meta['tokenizer.ggml.tokens'])} tokens"
        )
    return value


def _token_types(types: Sequence[int], meta: Mapping[str, Any]) -> list[int]:
    """Returns the types, in which what ends a turn is a control token even if the file says
    otherwise: some converters forget it."""
    fixed = list(types)
    for index in end_ids(meta):
        fixed[index] = CONTROL
    return fixed


def _added_tokens(
    tokens: Sequence[str], types: Sequence[int], special: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Control tokens are special; user-defined ones are matched whole, but are plain text."""
    roles = frozenset(special.values())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": index, "content": token, **flags, "special": kind != USER_DEFINED}
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or token in roles
    ]


def ends_template(
    bos: str | None, eos: str | None, id_of: Callable[[str], int | None]
) -> processors.TemplateProcessing:
    """Returns the post-processor that puts BOS before and EOS behind a text, where given."""
    before, behind = [bos] if bos else [], [eos] if eos else []
    tokens = [(token, id_of(token)) for token in (*before, *behind)]
    single = [*before, "$A", *behind]
    pair = [*single, *before, "$B", *behind]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _chat_template(meta: Mapping[str, Any]) -> dict[str, Any]:
    default = meta.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = [
        {"name": key.removeprefix(prefix), "template": text}
        for key, text in meta.items()
        if key.startswith(prefix)
    ]
    if default is None and not named:
        return {}
    if not named:
        return {"chat_template": default}
    first = [{"name": "default", "template": default}] if default is not None else []
    return {"chat_template": first + named}


def byte_spelling() -> str:
    """Returns 256 characters: how GPT-2 spells each byte as a printable character."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(spare)) for byte in range(256))
