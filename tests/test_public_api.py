"""The public surface is an explicit list; everything else may change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import octavo

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = """
LLM AsyncLLM AttentionConfig CapacityError ChatTemplateError CompletionOutput ConfigError
ContextLengthError EngineConfig EngineDeadError ModelError ModelNotFoundError OctavoError
OverloadedError PoolingParams PoolingRequestOutput RequestError RequestOutput SamplingParams
StructuredOutputsParams UnsupportedModelError WeightsError __version__
""".split()


def test_the_public_names_are_these_and_no_others():
    assert sorted(octavo.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_can_be_imported(name: str):
    value = getattr(octavo, name)
    assert value is not None
    if isinstance(value, type):
        assert value.__name__ == name


def test_dir_lists_the_public_names():
    assert set(PUBLIC) <= set(dir(octavo))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        octavo.LLMM  # type: ignore[attr-defined] # noqa: B018


def test_importing_the_package_loads_no_torch():
    code = "import sys, octavo; octavo.SamplingParams; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_version_is_the_packages():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{octavo.__version__}"' in text
