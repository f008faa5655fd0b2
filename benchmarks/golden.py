"""Greedy tokens and log-probabilities of every family on tiny random models, to the last bit.

    python benchmarks/golden.py before.json
    python benchmarks/golden.py after.json --compare before.json
    python benchmarks/golden.py after.json --compare before.json --device cuda --deterministic

Writes one entry for each model of tests/models/tiny.py and back end: the tokens, and the float32
log-probabilities of prompt and output in hexadecimal. With --compare, exits with 1 where an entry
of the file is missing or differs in a bit. Prompts share a prefix, and a step is small enough that
they are computed in chunks beside decodes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from octavo import LLM, SamplingParams
from octavo.outputs import RequestOutput
from tests.models.tiny import CASES, save_tiny

BACKENDS = {"cpu": ("reference", "native"), "cuda": ("triton",)}
PROMPT_LENS = (61, 3, 37, 90)
SHARED_LEN = 32
NUM_TOKENS = 24
VOCAB_SIZE = 211


def main() -> int:
    parser = argparse.ArgumentParser(description="Greedy tokens and log-probabilities")
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what must be equal")
    parser.add_argument("--device", choices=BACKENDS, default="cpu")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--cases", nargs="*", default=list(CASES), metavar="CASE")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            save_tiny(case, Path(folder))
            for backend in BACKENDS[options.device]:
                found[f"{case}/{backend}"] = record(
                    Path(folder), backend, options.device, options.deterministic
                )
        print(case, flush=True)
    options.output.write_text(json.dumps(found) + "\n")
    if options.compare is None:
        return 0
    problems = differences(json.loads(options.compare.read_text()), found)
    print("\n".join(problems) or "all bits are equal")
    return bool(problems)


def record(folder: Path, backend: str, device: str, is_deterministic: bool) -> list[Any]:
    """Returns what every prompt gives, all run together twice: cold, then on cached prefixes."""
    llm = LLM(
        str(folder),
        attention_backend=backend,
        device=device,
        deterministic=is_deterministic,
        skip_tokenizer_init=True,
        num_threads=1,
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=48,
        kv_cache_memory_bytes=1 << 22,
    )
    params = SamplingParams(
        temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=3, prompt_logprobs=1
    )
    cold = llm.generate(prompts(), params, use_tqdm=False)
    warm_params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    warm = llm.generate(prompts(), warm_params, use_tqdm=False)
    llm.close()
    return [entry(output) for output in cold] + [one.outputs[0].token_ids for one in warm]


def prompts() -> list[list[int]]:
    draw = random.Random(0)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(SHARED_LEN)]
    texts = [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENS]
    return [(shared + text)[: len(text)] if len(text) > SHARED_LEN else text for text in texts]


def entry(output: RequestOutput) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "tokens": list(completion.token_ids),
        "logprobs": hexadecimal(completion.logprobs or ()),
        "prompt": hexadecimal([one for one in output.prompt_logprobs or () if one]),
    }


def hexadecimal(positions: Sequence[Any]) -> list[str]:
    """Returns the ids and the float32 numbers of every position as one string."""
    return [
        " ".join(f"{token}:{float(one.logprob).hex()}" for token, one in sorted(position.items()))
        for position in positions
    ]


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Returns a line for every entry of `before` that `after` has not, or has otherwise."""
    return [
        f"{name}: " + ("differs" if name in after else "is missing")
        for name, value in before.items()
        if after.get(name) != value
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
