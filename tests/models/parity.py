"""What it means to equal transformers; loading tiny models the way the engine does.

Used by tests that drive a runner. The triton back end runs on the GPU where there is one, else
through Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from octavo.errors import ConfigError
from octavo.formats import kv_formats
from octavo.kernels.limits import attention_unfit
from octavo.kernels.ops import Ops
from octavo.kernels.registry import Needs, select_ops
from octavo.models.decoder import Decoder
from octavo.models.family import ignorable_names, weight_shapes
from octavo.models.load_decoder import load_decoder
from octavo.models.registry import read_spec
from octavo.weights.loader import check_names
from octavo.weights.placement import DevicePlacement, HostPlacement, Placement
from octavo.weights.safetensors_source import open_safetensors
from tests.models.tiny import TinyModel
from tests.runner.driver import Driver, Tracked

BACKENDS = ("reference", "native")
HAS_GPU = torch.cuda.is_available()
TOLERANCE = 1e-4
DEVICE_TOLERANCE = 1e-3
MAX_MODEL_LEN = 256
PROMPT_LENS = (61, 1, 33, 16)


@lru_cache(maxsize=3)
def _ops_or_reason(backend: str) -> Ops | str:
    torch.set_num_threads(1)
    try:
        return select_ops(backend, Needs(num_threads=2, device=_device_of(backend)))
    except (ConfigError, ImportError) as error:
        return str(error)


def _device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and HAS_GPU else "cpu")


def ops_or_skip(backend: str) -> Ops:
    """Returns the back end's ops, or skips the test with the reason why it does not fit."""
    if backend == "triton":
        pytest.importorskip("tests.kernels.triton.interpreter")
    found = _ops_or_reason(backend)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def load(tiny: TinyModel, ops: Ops, max_model_len: int) -> Decoder:
    spec, family = read_spec(tiny.config)
    source = open_safetensors(Path(tiny.folder), tiny.config["model_type"])
    check_names(source, weight_shapes(spec, family), ignorable_names(spec, family))
    placement: Placement = HostPlacement(source)
    if ops.name == "triton":
        placement = DevicePlacement(source, _device_of(ops.name))
    return load_decoder(spec, family, placement, ops, max_model_len)


def load_or_skip(tiny: TinyModel, ops: Ops, max_model_len: int) -> Decoder:
    """As `load`; skips the test where the back end says that it cannot attend for the model."""
    wants = read_spec(tiny.config)[0].attention_wants(kv_formats("float32"))
    reason = attention_unfit(ops.name, wants)
    if reason is not None:
        pytest.skip(f"{ops.name}: {reason}")
    return load(tiny, ops, max_model_len)


def drive(decoder: Decoder, **options: Any) -> Driver:
    """Returns a driver over the runner that the decoder's ops are for."""
    if decoder.ops.name == "triton":
        from tests.runner.device_driver import DeviceDriver

        return DeviceDriver(decoder, **options)
    return Driver(decoder, **options)


def prompts(vocab_size: int, lens: Sequence[int] = PROMPT_LENS) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, vocab_size, n).tolist() for n in lens]


def assert_parity(tiny: TinyModel, sequence: Tracked, tolerance: float = TOLERANCE) -> None:
    """Compares the logits of every computed token, and so every greedy choice."""
    computed = sequence.tokens[: sequence.num_computed]
    with torch.inference_mode():
        expected = tiny.reference(torch.tensor([computed])).logits[0]
    difference = (torch.stack(sequence.logits) - expected).abs().max().item()
    assert difference < tolerance
    greedy = expected[sequence.prompt_len - 1 :].argmax(-1).tolist()
    assert sequence.outputs == greedy[: len(sequence.outputs)]
