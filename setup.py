"""Builds the native CPU kernels with the package; everything else is in pyproject.toml.

The extension is optional: without a compiler, or on another CPU, the package installs without it
and runs on the ops in plain torch. Sources choose their instruction set themselves.
"""

import runpy
from pathlib import Path

from setuptools import Extension, setup

CPU = Path("octavo/kernels/cpu")
SOURCES = runpy.run_path(str(CPU / "fingerprint.py"))["fingerprint"](CPU)

setup(
    ext_modules=[
        Extension(
            "octavo.kernels.cpu._native",
            sources=sorted(str(path) for path in CPU.glob("*.cpp")),
            depends=sorted(str(path) for path in CPU.glob("*.h")),
            language="c++",
            define_macros=[("OCTAVO_SOURCES", f'"{SOURCES}"')],
            # No contraction: where a fused multiply-add is meant it is written, so that all
            # tiles round alike.
            extra_compile_args=[
                "-O3",
                "-g0",
                "-std=c++17",
                "-ffp-contract=off",
                "-fno-math-errno",
                "-fvisibility=hidden",
                "-pthread",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
