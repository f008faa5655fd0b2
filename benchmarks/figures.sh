#!/usr/bin/env bash
# The figures of README.md: every benchmark that they come from, as JSON lines in $1.
set -euo pipefail
output=${1:?usage: figures.sh OUTPUT.jsonl}
octavo=${OCTAVO:-octavo}

for model in demo demo-moe; do
  for shape in "16 128 128" "1 128 128" "1 1024 1"; do
    read -r batch input new <<<"$shape"
    "$octavo" bench latency "$model" --batch-size "$batch" --input-len "$input" \
      --output-len "$new" --repeat 3 --peer transformers --output "$output"
  done
done
"$octavo" bench prefix demo --output "$output"
