"""The peer of a benchmark: transformers' generate in float32, on the same prompts.

Called by `octavo bench latency|throughput --peer transformers`, after Octavo's own run. Never
measures loading; the optional dependency is imported when used.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

from octavo.errors import ConfigError


def check_peer() -> None:
    """Raises ConfigError if the peer is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "--peer transformers needs the package transformers; install octavo[dev]", field="peer"
        )


class TransformersPeer:
    """A loaded transformers model; one call of `generate` is one measured batch."""

    def __init__(self, model_path: Path, num_threads: int | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._torch = torch
        folder, extra = model_path, {}
        if model_path.is_file():
            folder, extra = model_path.parent, {"gguf_file": model_path.name}
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
        self._model = loaded.eval()
        # Without an end token every sequence runs to its full length, as ours do.
        self._model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], num_outputs: int) -> float:
        """Returns the seconds that one batch takes; all prompts must be equally long."""
        if len({len(prompt) for prompt in prompts}) != 1:
            raise ConfigError(
                "--peer transformers computes one batch of equal prompts; use one --input-len",
                field="peer",
            )
        torch = self._torch
        token_ids = torch.tensor(prompts)
        began = time.perf_counter()
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=token_ids,
                attention_mask=torch.ones_like(token_ids),
                max_new_tokens=num_outputs,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - began
        wanted = token_ids.shape[1] + num_outputs
        if made.shape[1] != wanted:
            raise ConfigError(f"transformers stopped at {made.shape[1]} of {wanted} tokens")
        return seconds
