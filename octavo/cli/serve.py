"""`octavo serve`: the OpenAI-compatible server in the foreground.

Called by the command line. Order: check the options, take the port, load the model, print the
memory plan, the URL and an example, and serve until Ctrl-C. Never imports torch or FastAPI before
the options and the port are known to be good.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo.cli.options import (
    Parser,
    Subparsers,
    add_options,
    engine_config,
    say,
    server_config,
)
from octavo.config import EngineConfig, ServerConfig
from octavo.vllm_options import Verdict, log_verdicts

if TYPE_CHECKING:
    import socket

    from octavo.async_llm import AsyncLLM

HELP = "serve a model over HTTP with the OpenAI API"
EXAMPLES = """examples:
  octavo serve demo-moe                        on http://127.0.0.1:8000
  octavo serve MODEL --host 0.0.0.0 --port 80 --api-key KEY
  octavo serve MODEL --tensor-parallel-size 2 --max-model-len 32K --served-model-name chat"""


def add_parser(subparsers: Subparsers) -> None:
    """Adds `serve` with all options of engine and server."""
    parser = subparsers.add_parser("serve", help=HELP, description=HELP, epilog=EXAMPLES)
    add_model(parser)
    add_options(parser, ServerConfig)
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser)


def add_model(parser: Parser) -> None:
    """Adds the positional MODEL."""
    what = "Hugging Face id, local folder, .gguf file, demo or demo-moe"
    parser.add_argument("model", metavar="MODEL", help=what)


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl-C; returns 0 after a clean end."""
    server, engine = server_config(args), engine_config(args)
    # The port first: a model takes long to load, only to find that nobody can reach it.
    import asyncio

    from octavo.server.http_protocol import new_event_loop
    from octavo.server.serve import bind

    with bind(server) as bound, asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(_serve(server, engine, bound, args.verdicts))
    return 0


async def _serve(
    server: ServerConfig,
    config: EngineConfig,
    bound: socket.socket,
    verdicts: Sequence[Verdict],
) -> None:
    from octavo.async_llm import AsyncLLM
    from octavo.observe.logs import configure_logging
    from octavo.server.serve import serve, url_of

    configure_logging(server.log_format, server.log_level)
    log_verdicts(verdicts)
    engine = AsyncLLM(config, log_format=server.log_format, log_level=server.log_level)
    say(f"loading {config.model} ...")
    try:
        await engine.start()
        announce(engine, server, url_of(bound, "https" if server.ssl_certfile else "http"))
        await serve(engine, server, bound)
    finally:
        await engine.close()


def announce(engine: AsyncLLM, server: ServerConfig, url: str) -> None:
    """Prints the memory plan, the URL, and a request to copy."""
    name = (server.served_model_name or (engine.model_name,))[0]
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 100,
    }
    key = " -H 'Authorization: Bearer YOUR_KEY'" if server.api_key or server.operator_key else ""
    key += " --cacert CERTIFICATE" if server.ssl_certfile else ""
    say(engine.plan.describe())
    say(f"\n{name} is served on {url}  (Ctrl-C ends it). Try:\n")
    say(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{json.dumps(body)}'\n"
    )
