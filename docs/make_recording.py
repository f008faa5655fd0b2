"""Makes docs/serve.svg from a running demo server: `python -m docs.make_recording URL`.

Asks the same question twice and draws what a terminal would show, so that the README's picture is
always something that happened.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
from rich.console import Console
from rich.text import Text

QUESTION = {
    "messages": [
        {
            "role": "system",
            "content": "You are a patient teacher. Answer in plain words, in at most three short "
            "sentences, and never use a formula. If you are not sure, say so. Speak as you would "
            "to a child of ten who likes stories about nature and animals.",
        },
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "max_tokens": 60,
    "temperature": 0,
}


def main(url: str) -> None:
    """Asks, and writes the picture."""
    console = Console(record=True, width=100, file=sys.stderr)
    for _ in range(2):
        console.print(Text(f"$ curl {url}/v1/chat/completions -d @question.json", style="bold"))
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60).json()
        console.print(Text(answer["choices"][0]["message"]["content"], style="green"))
        console.print(Text(json.dumps(answer["usage"]), style="cyan"))
    console.print(Text(f"$ curl {url}/metrics | grep octavo:prefix_cache", style="bold"))
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("octavo:prefix_cache") and not line.endswith(" 0.0"):
            console.print(Text(line))
    console.save_svg(str(Path(__file__).parent / "serve.svg"), title="make serve")


if __name__ == "__main__":
    main(sys.argv[1])
