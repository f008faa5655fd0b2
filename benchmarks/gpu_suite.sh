#!/bin/bash
# The tests that mean something on a GPU: kernels, runner, models, the engine end to end.
#
#   benchmarks/gpu_suite.sh [pytest arguments]        PYTHON=python3 by default
#
# Some minutes with a cold Triton cache, most of them in building kernels; CPU back ends, what is
# read of configs and what is compiled without a GPU are left to CI.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  { echo "torch sees no GPU here" >&2; exit 1; }
workers=()
if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 4 --dist worksteal); fi
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m pytest -q -p no:benchmark "${workers[@]}" --durations=10 \
  --ignore tests/models/test_config_fields.py tests/kernels/triton tests/runner tests/models tests/engine/test_llm.py tests/engine/test_gpu_memory.py \
  -k "not native] and not [native and not reference] and not [reference and not compiles_for_hopper and not compile_for" "$@"
