"""A tokenizer of as many tokens as large models have, made from the Python files of this machine.

Called by benchmarks whose models have random weights and no files: what a form costs depends on how
many tokens there are and what they spell. Nothing is downloaded.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

MAX_BYTES = 40_000_000
"""Of files that are read."""
END = "<|endoftext|>"
_WORDS = re.compile(rb" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+")
_MAX_SPELLING = 24


def write_tokenizer(folder: Path, num_tokens: int) -> None:
    """Writes a byte-level tokenizer.json with `num_tokens` ids: the beginnings of words that are
    seen most often, each joined of the one before it and a byte."""
    letters = _letters()
    counts: Counter[bytes] = Counter()
    for content in _contents():
        counts.update(_WORDS.findall(content))
    prefixes: Counter[bytes] = Counter()
    for word, count in counts.items():
        for length in range(2, min(len(word), _MAX_SPELLING) + 1):
            prefixes[word[:length]] += count
    room = num_tokens - len(letters) - 1
    kept = sorted((word for word, _ in prefixes.most_common(room)), key=len)
    spelt = ["".join(letters[byte] for byte in word) for word in kept]
    vocabulary = {token: place for place, token in enumerate([*sorted(letters.values()), *spelt])}
    core = tokenizers.Tokenizer(models.BPE(vocabulary, [(one[:-1], one[-1]) for one in spelt]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END])
    core.save(str(folder / "tokenizer.json"))


def _contents() -> Iterator[bytes]:
    paths = sysconfig.get_paths()
    num_bytes = 0
    for root in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"])):
        for path in sorted(Path(root).rglob("*.py")):
            content = path.read_bytes()
            num_bytes += len(content)
            if num_bytes > MAX_BYTES:
                return
            yield content


def _letters() -> dict[int, str]:
    """Returns how byte-level tokenizers write each byte: printable ones as they are, others as
    letters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {
        byte: chr(256 + place) for place, byte in enumerate(others)
    }
