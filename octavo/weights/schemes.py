"""What a checkpoint's config says of codes: their bits, their groups, for all tensors or for some.

Made by `quantization`, asked by `published`, which refuses what has other codes. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from octavo.errors import UnsupportedModelError
from octavo.weights.names import checkpoint_names

WHOLE_ROW = -1
_UNQUANTISED_BITS = 16
_PLAIN = re.compile(r"[\w.-]+")
"""A name, whose dots are dots."""
_PATTERN = "re:"
_MIXTURE = "MIXED_PRECISION"
_ALGORITHM_BITS = {
    **dict.fromkeys(("FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN"), 8),
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4"), 4),
}
"""ModelOpt's, of floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """What is said of the codes of a tensor; None is nothing."""

    kind: Literal["int", "float"] | None = None
    bits: int | None = None
    group: int | None = None
    """Columns that share a scale, or WHOLE_ROW. Tensors do not show it where the last group is
    smaller."""
    has_zeros: bool | None = None

    def allows(self, found: Scheme, cols: int, groups: int | None) -> bool:
        """Whether codes may be like this, in so many groups of a row (None: it does not matter)."""
        if self.kind not in (None, found.kind) or self.bits not in (None, found.bits):
            return False
        if self.has_zeros and not found.has_zeros:
            return False
        if self.group is None or groups is None:
            return True
        return groups == (1 if self.group == WHOLE_ROW else -(-cols // self.group))

    def __str__(self) -> str:
        if self.bits is not None and self.bits >= _UNQUANTISED_BITS:
            return "no codes at all"
        whole = self.group == WHOLE_ROW
        words = (
            "" if self.bits is None else f"{self.bits} bits",
            "" if self.kind is None else {"int": "integers", "float": "floats"}[self.kind],
            "" if self.group is None else "whole rows" if whole else f"groups of {self.group}",
            "zeros" if self.has_zeros else "",
        )
        return ", ".join(word for word in words if word)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A scheme for the modules whose names a pattern finds."""

    pattern: re.Pattern[str] | str
    """A text is looked for as it is: there may be thousands of modules and hundreds of rules."""
    is_from_start: bool
    scheme: Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class Schemes:
    """What the config says of all modules."""

    names: Mapping[str, Scheme] = field(default_factory=dict)
    """Of modules whose whole names are said; they come before the rules. There may be thousands."""
    rules: tuple[Rule, ...] = ()
    """The first that names a module counts."""
    others: tuple[Scheme, ...] = ()
    """Any of which the other modules may have; empty: nothing is said of them."""

    def of(self, module: str) -> tuple[Scheme, ...]:
        """Returns those that a module may have."""
        names = tuple(checkpoint_names(module))
        for name in names:
            if name in self.names:
                return (self.names[name],)
        lines = "\n".join(names)
        for rule in self.rules:
            pattern = rule.pattern
            if isinstance(pattern, str):
                is_found = pattern in lines
            else:
                find = pattern.match if rule.is_from_start else pattern.search
                is_found = any(map(find, names))
            if is_found:
                return (rule.scheme,)
        return self.others


def gptq_schemes(base: Scheme, dynamic: Any) -> Schemes:
    """Reads gptqmodel's `dynamic`: a pattern from a name's start on, "-:" before it for modules
    that stay numbers, and what they have instead of `base`. Raises UnsupportedModelError."""
    rules = []
    for text, changes in _entries("dynamic", dynamic):
        is_out, pattern = text.startswith("-:"), text.removeprefix("-:").removeprefix("+:")
        scheme = Scheme(bits=_UNQUANTISED_BITS) if is_out else _changed(base, changes)
        rules.append(Rule(pattern=_compiled(pattern), is_from_start=True, scheme=scheme))
    return Schemes(rules=tuple(rules), others=(base,))


def auto_round_schemes(base: Scheme, extra: Any) -> Schemes:
    """Reads AutoRound's `extra_config`: names, which come first, or patterns anywhere in one.
    Raises UnsupportedModelError."""
    names, rules = {}, []
    for text, changes in _entries("extra_config", extra):
        names[text] = _changed(base, changes)
        pattern = text if _PLAIN.fullmatch(text) else _compiled(text)
        rules.append(Rule(pattern=pattern, is_from_start=False, scheme=names[text]))
    return Schemes(names=names, rules=tuple(rules), others=(base,))


def compressed_schemes(groups: Any, ignored: Any = ()) -> Schemes:
    """Reads `config_groups` of compressed-tensors and ModelOpt, and the former's `ignore`. A module
    has the scheme of the target that is its name, then of the first pattern ("re:", from a name's
    start on) in the order of their texts. Classes cannot be seen in a checkpoint: a module that no
    target names may have the scheme of any group. Raises UnsupportedModelError."""
    names, patterns, found = {}, {}, []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        found.append(_compressed(weights))
        for target in _texts(group.get("targets")):
            (patterns if target.startswith(_PATTERN) else names)[target] = found[-1]
    plain = Scheme(bits=_UNQUANTISED_BITS)
    texts = _texts(ignored)
    names |= {text: plain for text in texts if not text.startswith(_PATTERN)}
    left_out = [(text, plain) for text in texts if text.startswith(_PATTERN)]
    rules = [
        Rule(pattern=_compiled(text.removeprefix(_PATTERN)), is_from_start=True, scheme=scheme)
        for text, scheme in (*left_out, *sorted(patterns.items(), key=lambda item: item[0]))
    ]
    return Schemes(names=names, rules=tuple(rules), others=tuple(found))


def _texts(found: Any) -> list[str]:
    return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


def modelopt_schemes(algorithm: Any, layers: Any) -> Schemes:
    """Reads ModelOpt's `quant_algo`, and of a mixture (MIXED_PRECISION) `quantized_layers`: what
    each module has. Raises UnsupportedModelError for what cannot be read."""
    if algorithm != _MIXTURE:
        return Schemes(others=() if algorithm is None else (_algorithm(algorithm),))
    listed = _entries("quantized_layers", layers)
    return Schemes(names={name: _algorithm(one.get("quant_algo")) for name, one in listed})


def _algorithm(name: Any) -> Scheme:
    bits = _ALGORITHM_BITS.get(str(name))
    if bits is None:
        known = ", ".join((*_ALGORITHM_BITS, _MIXTURE))
        raise UnsupportedModelError(
            f"quantization_config: quant_algo {name!r} cannot be read; known: {known}"
        )
    return Scheme(kind="float", bits=bits)


def _compressed(weights: Mapping[str, Any]) -> Scheme:
    kind, bits, group = weights.get("type", "int"), weights.get("num_bits"), None
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy in ("tensor", "channel"):
        group = WHOLE_ROW
    elif strategy == "block" and isinstance(shape := weights.get("block_structure"), list):
        size = shape[-1] if shape else None
    if strategy in ("group", "block") and type(size) is int and size > 0:
        group = size
    return Scheme(
        kind=kind if kind in ("int", "float") else None,
        bits=bits if type(bits) is int else None,
        group=group,
        has_zeros=True if weights.get("symmetric") is False else None,
    )


def _entries(field: str, found: Any) -> Sequence[tuple[str, Mapping[str, Any]]]:
    is_object = isinstance(found, Mapping)
    listed = [(str(text), one or {}) for text, one in found.items()] if is_object else []
    if (found and not is_object) or not all(isinstance(one, Mapping) for _, one in listed):
        raise UnsupportedModelError(
            f"quantization_config: {field} must be an object of objects, not {found!r}"
        )
    return listed


def _changed(base: Scheme, changes: Mapping[str, Any]) -> Scheme:
    bits, group = changes.get("bits", base.bits), changes.get("group_size", base.group)
    for name, value in (("bits", bits), ("group_size", group)):
        if value is not None and type(value) is not int:
            raise UnsupportedModelError(
                f"quantization_config: {name} {value!r} of some modules is no whole number"
            )
    return replace(base, bits=bits, group=group)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UnsupportedModelError(
            f"quantization_config: {pattern!r}, which is to find modules, is no pattern: {error}"
        ) from error
