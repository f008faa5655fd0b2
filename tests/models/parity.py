"""What it means to equal transformers; loading tiny models the way the engine does.

Used by tests that drive a runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError
from octavo.kernels.ops import Ops
from octavo.kernels.registry import Needs, select_ops
from octavo.models.decoder import Decoder, load_decoder
from octavo.models.family import ignorable_names, weight_shapes
from octavo.models.registry import read_spec
from octavo.weights.loader import check_names
from octavo.weights.placement import HostPlacement
from octavo.weights.safetensors_source import open_safetensors
from tests.models.tiny import TinyModel
from tests.runner.driver import Tracked

BACKENDS = ("reference", "native")
TOLERANCE = 1e-4
MAX_MODEL_LEN = 256
PROMPT_LENS = (61, 1, 33, 16)


@lru_cache(maxsize=2)
def _ops_or_reason(backend: str) -> Ops | str:
    torch.set_num_threads(1)
    try:
        return select_ops(backend, Needs(num_threads=2))
    except (ConfigError, ImportError) as error:
        return str(error)


def ops_or_skip(backend: str) -> Ops:
    """Returns the back end's ops, or skips the test with the reason why it does not fit."""
    found = _ops_or_reason(backend)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def load(tiny: TinyModel, ops: Ops, max_model_len: int) -> Decoder:
    spec, family = read_spec(tiny.config)
    source = open_safetensors(Path(tiny.folder), tiny.config["model_type"])
    check_names(source, weight_shapes(spec, family), ignorable_names(spec, family))
    return load_decoder(spec, family, HostPlacement(source), ops, max_model_len)


def prompts(vocab_size: int, lens: Sequence[int] = PROMPT_LENS) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab_size, n).tolist() for n in lens]


def assert_parity(tiny: TinyModel, sequence: Tracked) -> None:
    """Compares the logits of every computed token, and so every greedy choice."""
    computed = sequence.tokens[: sequence.num_computed]
    with torch.inference_mode():
        expected = tiny.reference(torch.tensor([computed])).logits[0]
    difference = (torch.stack(sequence.logits) - expected).abs().max().item()
    assert difference < TOLERANCE
    greedy = expected[sequence.prompt_len - 1 :].argmax(-1).tolist()
    assert sequence.outputs == greedy[: len(sequence.outputs)]
