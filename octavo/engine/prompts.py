"""Owns how prompts are read that Python users give: texts, ids, arrays, mappings, one or many.

Called by LLM and AsyncLLM. Never tokenises, and never looks at single ids: that is the input
processor's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.errors import RequestError, shown
from octavo.request import SamplingParams, checked_copy
from octavo.request_fields import Refused, refuse_field
from octavo.request_limits import Array

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids (a list, or an array of NumPy or torch), or {"prompt": text} or
{"prompt_token_ids": ids} as in vLLM."""

_WANTED = "text, token ids, or a mapping with prompt or prompt_token_ids"
_REFUSED: Refused = {
    name: ("the model reads and writes text only", ({},))
    for name in ("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs")
} | {"prompt_embeds": ("send token ids or text", ()), "type": ("leave it out", ("text", "token"))}
_NO_LISTS = (str, bytes, bytearray, set, frozenset, Mapping)
"""Iterable, but no ids in an order."""
_KNOWN = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPrompt:
    """One prompt as it was given."""

    content: str | Sequence[int]
    cache_salt: str | None = None


def read_prompts(prompts: Any) -> list[GivenPrompt]:
    """Returns the prompts one by one; flat ids are one prompt. Raises RequestError."""
    if isinstance(prompts, str | Mapping):
        return [read_prompt(prompts)]
    items = _items(prompts, "prompts")
    if items and (_is_number(items[0]) or isinstance(items[0], bool)):
        return [GivenPrompt(content=items)]
    return [read_prompt(item, f"prompts[{place}]") for place, item in enumerate(items)]


def read_prompt(prompt: Any, where: str = "prompt") -> GivenPrompt:
    """Returns one prompt. Raises RequestError naming what cannot be read."""
    if isinstance(prompt, str):
        return GivenPrompt(content=prompt)
    if not isinstance(prompt, Mapping):
        return GivenPrompt(content=_items(prompt, where))
    given = {name: value for name, value in prompt.items() if value is not None}
    for name, value in given.items():
        if name in _REFUSED:
            refuse_field(name, value, _REFUSED, f"{where}.")
        elif name not in _KNOWN:
            message = f"{where} has an unknown field {shown(name)}; use {', '.join(_KNOWN)}"
            raise RequestError(message, param="prompt")
    salt = given.get("cache_salt")
    if salt is not None and not isinstance(salt, str):
        raise RequestError(f"{where}.cache_salt must be text, got {shown(salt)}", param="prompt")
    if "prompt_token_ids" in given:
        # The text beside ids is what they came from.
        content = _items(given["prompt_token_ids"], f"{where}.prompt_token_ids")
        return GivenPrompt(content=content, cache_salt=salt)
    if not isinstance(given.get("prompt"), str):
        what = f"got {shown(given.get('prompt'))}" if "prompt" in given else "it has neither"
        raise RequestError(
            f"{where} must have prompt (text) or prompt_token_ids; {what}", param="prompt"
        )
    return GivenPrompt(content=given["prompt"], cache_salt=salt)


def _items(given: Any, where: str) -> list[Any] | tuple[Any, ...]:
    """Returns what a list, an array or any other iterable in order holds."""
    if isinstance(given, list | tuple):
        return given
    if isinstance(given, Array):
        listed = given.tolist()
        if isinstance(listed, list):
            return listed
    elif isinstance(given, Iterable) and not isinstance(given, _NO_LISTS):
        return list(given)
    raise RequestError(f"{where} must be {_WANTED}, got {type(given).__name__}", param="prompt")


def _is_number(value: Any) -> bool:
    """Whether it can be an id: also a number of NumPy's, or a tensor of one number."""
    if isinstance(value, Array):
        return value.ndim == 0
    return isinstance(value, int)


def params_for(
    items: Sequence[GivenPrompt], given: SamplingParams | Iterable[SamplingParams]
) -> list[SamplingParams]:
    """Returns checked copies, one for each prompt: the user may change his later. Raises
    RequestError where there are several, and not one each."""
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        return [checked_copy(given)] * len(items)
    each = [checked_copy(one) for one in given]
    if len(each) != len(items):
        raise RequestError(
            f"{len(items)} prompts and {len(each)} sampling_params; give one, or one each",
            param="sampling_params",
        )
    return each
