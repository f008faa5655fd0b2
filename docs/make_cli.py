"""Writes docs/cli.md from the options of the commands. Run by `make docs`, checked by a test."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from octavo.cli.commands import build_parser
from octavo.cli.options import options_of
from octavo.config import EngineConfig, ServerConfig

HEAD = """# The command line

Made by `make docs` from `octavo/config/` and the commands; do not edit by hand.

| command | what it does |
| --- | --- |
"""

ENGINE_HEAD = """
## Engine options

Of `serve`, `chat MODEL`, `render`, `plan` and the offline benchmarks; with underscores also of
`LLM(...)` and `AsyncLLM(...)`. A SIZE is like 4096, 512MiB or 4GiB; counts of tokens are like 4096
or 4K.
`--enable-prefix-caching` and `--no-enable-prefix-caching` are `--prefix-caching on` and `off`.
Options of vLLM that are known besides: [from_vllm.md](from_vllm.md).

"""


def table(config: type[EngineConfig] | type[ServerConfig]) -> str:
    """Returns a Markdown table of a config's options."""
    rows = ["| option | value | default | meaning |", "| --- | --- | --- | --- |"]
    for option in options_of(config):
        value = option.shown_value.strip("{}").replace(",", ", ")
        flags = ", ".join(f"`{flag}`" for flag in option.flags)
        cells = f"| {flags} | {value} | {option.shown_default} | {option.help} |"
        rows.append(cells.replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(rows)


def own_options(parser: argparse.ArgumentParser) -> str:
    """Returns the options of a command that are not the engine's or the server's."""
    shared = {
        option.field for config in (EngineConfig, ServerConfig) for option in options_of(config)
    }
    rows = []
    for action in parser._actions:
        name = ", ".join(action.option_strings) or str(action.metavar)
        if action.help == argparse.SUPPRESS or (
            action.dest in shared | {"help"} and action.dest != "api_key"
        ):
            continue
        if action.dest == "model" and not action.option_strings:
            continue
        help = (action.help or "").replace("%(default)s", str(action.default))
        rows.append(f"| `{name}` | {_value(action)} | {help} |".replace("|  |", "| |"))
    return "\n".join(["| option | value | meaning |", "| --- | --- | --- |", *rows]) if rows else ""


def _value(action: argparse.Action) -> str:
    """Returns what is written after an option; nothing for a switch and an argument by place."""
    if not action.option_strings or action.nargs == 0:
        return ""
    if action.choices is not None:
        return ", ".join(map(str, action.choices))
    shown = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    return shown.replace("|", " or ")


def _sentence(text: str | None) -> str:
    return (text or "")[:1].upper() + (text or "")[1:]


def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Returns the sub-commands of a parser by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def render() -> str:
    """Returns the whole page."""
    found = commands(build_parser())
    text = HEAD + "\n".join(f"| `octavo {name}` | {p.description} |" for name, p in found.items())
    text += (
        "\n\nMODEL is a Hugging Face id, a local folder, a `.gguf` file, `demo` or `demo-moe`.\n"
    )
    for name, parser in found.items():
        inner = commands(parser)
        pages = inner and {f"{name} {key}": value for key, value in inner.items()}
        for title, page in (pages or {name: parser}).items():
            options = own_options(page) if title != "serve" else ""
            if options:
                text += f"\n## octavo {title}\n\n{_sentence(page.description)}.\n\n{options}\n"
    text += ENGINE_HEAD + table(EngineConfig)
    return f"{text}\n\n## Server options\n\nOf `serve`.\n\n{table(ServerConfig)}\n"


if __name__ == "__main__":
    if "--stdout" in sys.argv:
        print(render(), end="")
    else:
        Path(__file__).with_name("cli.md").write_text(render(), encoding="utf-8")
