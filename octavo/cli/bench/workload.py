"""The requests of a benchmark: lengths and prompts from one seed, so that a run can be repeated.

Called by every benchmark. Never looks at the clock.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A number of tokens: always `low`, or anything in low..high with equal chance."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}:{self.high}"


def parse_lengths(text: str) -> Lengths:
    """Returns Lengths from "128" or "100:1000"."""
    low, _, high = text.partition(":")
    try:
        lengths = Lengths(low=int(low), high=int(high or low))
    except ValueError:
        lengths = Lengths(low=0, high=0)
    if not 1 <= lengths.low <= lengths.high:
        raise argparse.ArgumentTypeError(f"{text!r} is no length; write it like 128 or 100:1000")
    return lengths


def positive(text: str) -> int:
    """Returns an integer of at least 1."""
    value = int(text) if text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer of at least 1")
    return value


def parse_goodput(text: str) -> tuple[str, float]:
    """Returns ("ttft", seconds) from "ttft:500", whose number is in milliseconds."""
    name, _, number = text.partition(":")
    try:
        limit = float(number)
    except ValueError:
        limit = 0.0
    if name not in ("ttft", "tpot", "e2e") or not limit > 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no goal; write it like ttft:500, tpot:50 or e2e:2000 (milliseconds)"
        )
    return name, limit / 1e3


@dataclass(slots=True, kw_only=True)
class PromptSource:
    """Draws prompts: random token ids, or pieces of a text that was tokenised."""

    vocab_size: int
    seed: int
    text_ids: list[int] | None = None

    def draw(self, count: int, lengths: Lengths, round_: int = 0) -> list[list[int]]:
        """Returns `count` prompts; another `round_` gives others that share no prefix."""
        rng = random.Random(f"{self.seed}/{round_}")
        return [self._one(lengths.draw(rng), rng) for _ in range(count)]

    def _one(self, length: int, rng: random.Random) -> list[int]:
        if self.text_ids is None:
            return [rng.randrange(self.vocab_size) for _ in range(length)]
        if len(self.text_ids) < length:
            raise ConfigError(
                f"--text has {len(self.text_ids)} tokens, a prompt needs {length}; use a longer "
                "text or a smaller --input-len",
                field="text",
            )
        start = rng.randrange(len(self.text_ids) - length + 1)
        return self.text_ids[start : start + length]


def read_text_ids(path: str | None, encode: Callable[[str], list[int]]) -> list[int] | None:
    """Returns the tokens of the file `path`, or None if there is none."""
    if path is None:
        return None
    try:
        return list(encode(Path(path).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}", field="text") from error
