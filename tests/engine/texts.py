"""Texts that tokenizers must not stumble over."""

from __future__ import annotations

import random


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    bits = [
        "a",
        "The ",
        " ",
        "  ",
        "\n",
        "12",
        "\xe9",
        "\u4e2d",
        "\U0001f600",
        "\t",
        "don't",
        "<|im_end|>",
        "<",
    ]
    bits += ["</s>", "<tool>", "\u2581", "\xdf", "quick", " fox"]
    return [
        "".join(
            rng.choice(bits) if rng.random() < 0.8 else chr(rng.randint(0x20, 0xD7FF))
            for _ in range(rng.randint(1, 30))
        )
        for _ in range(count)
    ]


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content} for content in contents]
