"""What only the interpreter runs here is compiled for a Hopper as well."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CASES = (
    *("routing", "attention", "kv fp8", "kv int8/int4"),
    *("latent decode", "latent short", "latent long", "latent int4", "latent fp8"),
    *("packed int4_32_f16", "packed int4_128_bf16", "packed fp8", "packed fp8_row"),
    *("sums of 2", "sums of 4", "kept", "numbers"),
    *("packed int8_64", "packed q4_1", "packed mxfp4", "packed nvfp4", "packed iq4_xs"),
    *("packed q4_k", "packed q5_k", "packed q6_k", "packed q2_k", "packed q3_k"),
)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_a_gpu(case: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.triton.compiled", case]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "_kernel" in done.stdout
