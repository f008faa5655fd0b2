"""What a model makes of a text instead of the next token: a vector, or scores of labels.

Read from a checkpoint's config.json and from what sentence-transformers keeps beside it; kept by
ModelSpec. Data only: it never touches a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from octavo.errors import UnsupportedModelError

Kind = Literal["embed", "classify", "score"]
"""A vector of the text, probabilities of several labels, or one score."""
Reads = Literal["last", "mean", "cls"]
Activation = Literal["none", "sigmoid", "softmax"]

CLASSIFIER = "ForSequenceClassification"
_POOLING_MODES: Mapping[str, Reads] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_POOLING_FLAGS: Mapping[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_ACTIVATIONS: Mapping[str, Activation] = {
    "Identity": "none",
    "Sigmoid": "sigmoid",
    "Softmax": "softmax",
}
_PROBLEMS: Mapping[str, Activation] = {
    "regression": "none",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
_MODULES = ("Pooling", "Normalize", "LogitScore")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingSpec:
    """Which hidden states become what."""

    kind: Kind
    reads: Reads = "last"
    """Whose hidden states: the last token's, the mean of all, or the first token's."""
    normalize: bool = False
    """Whether an embedding has the length 1."""
    matryoshka: tuple[int, ...] | bool = False
    """Whether the first numbers of an embedding are one, too; or how many of them."""
    labels: tuple[str, ...] = ()
    """Of scores, in their order."""
    label_tokens: tuple[int, ...] = ()
    """Where labels are tokens and the head is the language model's: the token whose logit is the
    score, and the one whose logit is taken from it, if there is one."""
    activation: Activation = "none"
    """From logits of labels to what is told."""

    @property
    def needs_all_states(self) -> bool:
        return self.reads != "last"

    @property
    def num_labels(self) -> int:
        """Rows of the model's own head for labels; 0 without one."""
        return 0 if self.label_tokens else len(self.labels)

    @property
    def described(self) -> str:
        """The model's kind, in words for those who ask for something else."""
        if self.kind == "embed":
            return "an embedding model"
        if self.kind == "score":
            return "a model that scores pairs of texts"
        return f"a classifier of {len(self.labels)} labels"


EMBEDDING = PoolingSpec(kind="embed", normalize=True)
"""Of a decoder of which nothing is said."""


def read_pooling(
    config: Mapping[str, Any], modules: Sequence[Mapping[str, Any]]
) -> PoolingSpec | None:
    """Returns what the model makes of texts; None if it only generates.

    `modules` are those of `weights.modules`. Raises UnsupportedModelError.
    """
    architecture = _architecture(config)
    if config.get("is_causal") is False:
        _refuse("config.json", "is_causal", False, "true: tokens see those before them alone")
    for place, module in enumerate(modules):
        if module["type"] not in _MODULES:
            known = ", ".join(("Transformer", *_MODULES))
            raise UnsupportedModelError(
                f"modules.json: module {place + 1} is {module['type']!r}; known: {known}"
            )
    found = {module["type"]: module["config"] for module in modules}
    if architecture.endswith(CLASSIFIER):
        return _classifier(config)
    if "LogitScore" in found:
        return _label_tokens(found["LogitScore"])
    if "Pooling" in found:
        return PoolingSpec(
            kind="embed",
            reads=_reads(found["Pooling"]),
            normalize="Normalize" in found,
            matryoshka=_matryoshka(config),
        )
    if architecture.endswith("Model"):
        return PoolingSpec(kind="embed", normalize=True, matryoshka=_matryoshka(config))
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list | tuple) and names else ""


def _refuse(where: str, name: str, value: object, known: str) -> NoReturn:
    raise UnsupportedModelError(f"{where}: {name} is {value!r}; known: {known}")


def _reads(config: Mapping[str, Any]) -> Reads:
    where, known = "Pooling", ", ".join(_POOLING_MODES)
    given = config.get("pooling_mode")
    modes = [given] if isinstance(given, str) else given
    if not isinstance(modes, list | tuple):
        modes = [mode for flag, mode in _POOLING_FLAGS.items() if config.get(flag) is True]
    if len(modes) != 1 or modes[0] not in _POOLING_MODES:
        _refuse(where, "pooling_mode", modes, f"one of {known}")
    reads = _POOLING_MODES[modes[0]]
    if reads != "last" and config.get("include_prompt") is False:
        _refuse(where, "include_prompt", False, "true: where a prompt ends is not known here")
    return reads


def _matryoshka(config: Mapping[str, Any]) -> tuple[int, ...] | bool:
    dimensions = config.get("matryoshka_dimensions")
    if dimensions is None:
        return config.get("is_matryoshka") is True
    if not isinstance(dimensions, list) or not all(type(one) is int for one in dimensions):
        _refuse("config.json", "matryoshka_dimensions", dimensions, "a list of integers")
    return tuple(sorted(dimensions))


def _label_tokens(config: Mapping[str, Any]) -> PoolingSpec:
    tokens = [config.get("true_token_id"), config.get("false_token_id")]
    given = tuple(token for token in tokens if token is not None)
    if tokens[0] is None or not all(type(token) is int and token >= 0 for token in given):
        _refuse("LogitScore", "true_token_id and false_token_id", tokens, "token ids")
    return PoolingSpec(kind="score", labels=("LABEL_0",), label_tokens=given, activation="sigmoid")


def _classifier(config: Mapping[str, Any]) -> PoolingSpec:
    labels = _labels(config)
    return PoolingSpec(
        kind="classify" if len(labels) > 1 else "score",
        labels=labels,
        activation=_activation(config, len(labels)),
    )


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("id2label")
    if isinstance(named, Mapping) and named:
        places = sorted(named, key=lambda key: int(key) if str(key).isdecimal() else -1)
        if [str(place) for place in places] != [str(place) for place in range(len(places))]:
            _refuse("config.json", "id2label", dict(named), "labels by 0, 1, 2, ...")
        return tuple(str(named[place]) for place in places)
    count = config.get("num_labels", 2)
    if type(count) is not int or count < 1:
        _refuse("config.json", "num_labels", count, "an integer of at least 1")
    return tuple(f"LABEL_{place}" for place in range(count))


def _activation(config: Mapping[str, Any], num_labels: int) -> Activation:
    """As sentence-transformers says, or as the problem's type wants; else the usual one."""
    nested = config.get("sentence_transformers")
    named = nested.get("activation_fn") if isinstance(nested, Mapping) else None
    named = named or config.get("sbert_ce_default_activation_function")
    if named is not None:
        last = str(named).rpartition(".")[2].removesuffix("()")
        if last not in _ACTIVATIONS:
            _refuse("config.json", "activation_fn", named, ", ".join(_ACTIVATIONS))
        return _ACTIVATIONS[last]
    problem = config.get("problem_type")
    if problem is None:
        return "softmax" if num_labels > 1 else "sigmoid"
    if problem not in _PROBLEMS:
        _refuse("config.json", "problem_type", problem, ", ".join(_PROBLEMS))
    if problem == "single_label_classification" and num_labels == 1:
        return "sigmoid"
    return _PROBLEMS[problem]
