"""`octavo render`: what a request's body becomes as a prompt, without an engine.

Called by the command line. Reads the model's tokenizer and template, never a weight.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from octavo.cli.options import Subparsers, add_options, engine_config
from octavo.cli.serve import add_model
from octavo.config import EngineConfig
from octavo.errors import ConfigError

HELP = "show a request's prompt as text and token ids, without an engine"
EXAMPLES = """examples:
  octavo render demo-moe --body chat.json
  echo '{"prompt": "Once upon"}' | octavo render demo-moe
  octavo render MODEL --api messages --body messages.json"""
APIS = ("chat", "completions", "messages")


def add_parser(subparsers: Subparsers) -> None:
    """Adds `render`."""
    parser = subparsers.add_parser("render", help=HELP, description=HELP, epilog=EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--body", metavar="FILE", help="the body, as it would be sent; else it is read from stdin"
    )
    parser.add_argument(
        "--api",
        choices=APIS,
        metavar="{chat,completions,messages}",
        help="whose body it is; without it, completions if it has a prompt, else chat",
    )
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Prints a line of JSON for each prompt. Raises ConfigError, RequestError, ModelError."""
    from octavo.engine.front_end import FrontEnd

    content = _content(args.body)
    for prompt in _prompts(FrontEnd(engine_config(args)), content, args.api):
        print(json.dumps(prompt, ensure_ascii=False))
    return 0


def _content(path: str | None) -> bytes:
    try:
        return sys.stdin.buffer.read() if path is None else Path(path).read_bytes()
    except OSError as error:
        message = f"--body {path!r} cannot be read: {error.strerror}"
        raise ConfigError(message, field="body") from error


def _prompts(front_end: Any, content: bytes, api: str | None) -> list[dict[str, Any]]:
    from octavo.server.protocol.chat import ChatRequest
    from octavo.server.protocol.completions import CompletionRequest
    from octavo.server.protocol.decoding import decode
    from octavo.server.protocol.messages import CountTokensRequest
    from octavo.server.protocol.parsing import parse

    data, tokenizer = decode(content), front_end.tokenizer
    if api is None:
        api = "completions" if isinstance(data, dict) and "prompt" in data else "chat"
    if api == "completions":
        body = parse(CompletionRequest, data)
        return [
            _told(tokenizer.encode(one, body.add_special_tokens) if isinstance(one, str) else one)
            for one in body.prompts()
        ]
    is_chat = api == "chat"
    chat = parse(ChatRequest, data) if is_chat else parse(CountTokensRequest, data).chat()
    rendered = chat.render(tokenizer.chat_renderer)
    return [{"text": rendered.shown, **_told(tokenizer.encode_rendered(rendered))}]


def _told(ids: Any) -> dict[str, Any]:
    return {"num_tokens": len(ids), "token_ids": [*ids]}
