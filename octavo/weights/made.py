"""What weights become when they are loaded: `--quantization` of a model that is not quantised.

Asked by `loader` and by plans. Never imports torch. Names of `DUMMY_QUANTIZATIONS` are for random
weights alone: they make a layer as large as a published file's, for measuring.
"""

from __future__ import annotations

import re
from typing import Literal

from octavo.formats import FP8, GGUF_FORMATS, GROUP, WeightFormat, int4_format, int8_format

LoadQuantization = Literal["fp8", "int8", "int4"]
LOAD_FORMATS: dict[LoadQuantization, WeightFormat] = {
    "fp8": FP8,
    "int8": int8_format(128),
    "int4": int4_format(128, "f16"),
}
"""What a model that is not quantised can be made when it is loaded."""
_MIXTURES = {"q4_k_m": "q4_k", "q5_k_m": "q5_k"}
"""llama.cpp's, whose down and value projections have six bits in every other layer or so."""
DUMMY_QUANTIZATIONS = (
    *("fp8_block", "mxfp4", "nvfp4", "q8_0", "q5_0", "iq4_xs"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", *_MIXTURES),
)
"""What random weights can be made besides: FP8 by blocks, MXFP4 of experts alone, all else."""
_KEPT = frozenset("embed_tokens lm_head gate router shared_expert_gate score kv_b_proj".split())
"""Last parts of the names of matrices that stay numbers."""
BLOCK = 256
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def load_quantization(name: str | None) -> LoadQuantization | None:
    """Returns what any weights can be made by this name of theirs."""
    return next((kind for kind in LOAD_FORMATS if kind == name), None)


def can_be_made(name: str, *, is_dummy: bool) -> bool:
    """Whether weights, or random ones, can be made what is called so."""
    return name in LOAD_FORMATS or (is_dummy and name in DUMMY_QUANTIZATIONS)


def made_format(
    kind: str, name: str, shape: tuple[int, ...], num_layers: int
) -> WeightFormat | None:
    """Returns what the tensor called `name` becomes of `num_layers` layers; None: it stays."""
    module = name.removesuffix(".weight").rpartition(".")[2]
    if kind in _MIXTURES and module in ("embed_tokens", "lm_head") and shape[1] % BLOCK == 0:
        return GGUF_FORMATS["q6_k" if module == "lm_head" else _MIXTURES[kind]]
    if len(shape) != 2 or shape[1] % GROUP or module in _KEPT:
        return None
    if (found := load_quantization(kind)) is not None:
        return LOAD_FORMATS[found]
    if kind == "mxfp4" and ".experts." not in name:
        return None
    if kind in _MIXTURES:
        layer = _LAYER.match(name)
        is_more = layer is not None and _has_more_bits(int(layer[1]), num_layers)
        form = GGUF_FORMATS[_MIXTURES[kind]]
        if is_more and module in ("down_proj", "w2", "v_proj"):
            form = GGUF_FORMATS["q6_k"]
    else:
        form = FP8 if kind == "fp8_block" else GGUF_FORMATS[kind]
    return None if shape[1] % form.block_size and not form.is_padded else form


def _has_more_bits(layer: int, num_layers: int) -> bool:
    """Whether llama.cpp's mixtures spend more on a layer: the first and last eighth, and every
    third between."""
    eighth = num_layers // 8
    is_outer = layer < eighth or layer >= num_layers - eighth
    return is_outer or (layer - eighth) % 3 == 2
