#!/bin/bash
# What only GPUs can prove, on a machine with two of them, in under ten minutes: the suite and a soak
# side by side, then tensor parallelism.
#
#   benchmarks/gpu_proof.sh FOLDER        PYTHON=python3 by default; logs go to FOLDER
#
# Timings taken meanwhile are worth nothing. Exits with 1 if a part failed or outran its limit.
set -u
cd "$(dirname "$0")/.."
folder=${1:?usage: gpu_proof.sh FOLDER}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
began=$SECONDS failed=0

part() { # NAME LIMIT COMMAND...
  local name=$1 limit=$2 code=0
  shift 2
  timeout -s ABRT "$limit" "$@" >"$folder/$name.txt" 2>&1 || code=$?
  echo "$name: exit $code, $((SECONDS - began)) s since the start"
  tail -n 12 "$folder/$name.txt"
  return "$code"
}

mkdir -p "$folder"
# Five minutes under load, some forty seconds to start and as many to run empty.
CUDA_VISIBLE_DEVICES=0 part soak 440 "$PYTHON" benchmarks/soak.py qwen3-30b-a3b --seconds 300 &
soak=$!
CUDA_VISIBLE_DEVICES=1 part suite 440 benchmarks/gpu_suite.sh -n 12 -p no:cacheprovider || failed=1
wait "$soak" || failed=1
part tensor_parallel 160 "$PYTHON" -m benchmarks.tensor_parallel --stages check,tokens --seconds 120 ||
  failed=1
exit "$failed"
