"""What must hold before any test module is imported."""

import os
from pathlib import Path

# Triton decides at its import whether kernels are interpreted, and transformers imports it too.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
