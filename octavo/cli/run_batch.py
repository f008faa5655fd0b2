"""`octavo run-batch`: a file of requests in, a file of answers out, without a server.

Called by the command line. Lines are those of /v1/batches, each for the route that its `url` names.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from octavo.cli.options import Subparsers, add_options, engine_config, say
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError, EngineDeadError

if TYPE_CHECKING:
    from octavo.server.batches.offline import Progress

logger = logging.getLogger(__name__)

HELP = "run a file of requests without a server"
EXAMPLES = """examples:
  octavo run-batch -i requests.jsonl -o answers.jsonl --model demo-moe
  octavo run-batch -i pairs.jsonl -o scores.jsonl --model Qwen/Qwen3-Reranker-0.6B --runner pooling

A line of the input, like one of OpenAI's batches:
  {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}"""
TELL_SECONDS = 10.0


def add_parser(subparsers: Subparsers) -> None:
    """Adds `run-batch`."""
    parser = subparsers.add_parser("run-batch", help=HELP, description=HELP, epilog=EXAMPLES)
    add = parser.add_argument
    add("--input-file", "-i", metavar="FILE", required=True, help="requests, one a line")
    add("--output-file", "-o", metavar="FILE", required=True, help="answers, in the same order")
    what = "Hugging Face id, local folder, .gguf file, demo or demo-moe"
    add("--model", metavar="MODEL", required=True, help=what)
    add_options(parser, ServerConfig, only=("served_model_name",))
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Runs all lines; returns 0 when each has its answer or its error, 1 if the engine died."""
    import asyncio

    from octavo.observe.logs import configure_logging

    names = tuple(vars(args).get("served_model_name", ()))
    server = ServerConfig(served_model_name=names, max_store_bytes=0).resolve()
    config = engine_config(args)
    configure_logging("text", "warning", owns_stderr=True)
    source, target = _readable(args.input_file), Path(args.output_file)
    if target.exists() and target.samefile(source):
        message = "--output-file is the input file; name another one"
        raise ConfigError(message, field="output_file")
    try:
        output = target.open("wb")
    except OSError as error:
        message = f"--output-file {str(target)!r} cannot be written: {error.strerror}"
        raise ConfigError(message, field="output_file") from error
    with output:
        return asyncio.run(_run(server, config, source, output))


def _readable(given: str) -> Path:
    path = Path(given)
    reason = None
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        reason = error.strerror
    if "://" in given:
        reason = "only files of this machine are read; download it first"
    if reason is not None:
        raise ConfigError(f"--input-file {given!r}: {reason}", field="input_file")
    return path


async def _run(server: ServerConfig, config: EngineConfig, source: Path, output: BinaryIO) -> int:
    from octavo.async_llm import AsyncLLM
    from octavo.server.app import create_app
    from octavo.server.batches.offline import FileRun
    from octavo.server.beside import beside

    say(f"loading {config.model} ...")
    began = time.monotonic()
    async with AsyncLLM(config, log_level="warning") as engine:
        state = create_app(engine, server).state.server
        loaded = time.monotonic()
        say(f"loaded in {loaded - began:.0f} s")
        async with beside(state):
            lines = FileRun(state, output, f"batch_{secrets.token_hex(8)}", _teller())
            progress = None
            try:
                progress = await lines.run(source)
            except* EngineDeadError as group:
                logger.error("%s", group.exceptions[0])
        if progress is None:
            return 1
        seconds = time.monotonic() - loaded
        say(f"{progress.done} lines in {seconds:.1f} s, {progress.failed} of them with an error")
    return 0


def _teller() -> Callable[[Progress], None]:
    """Returns what says how far a run is, now and then."""
    told_at = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= TELL_SECONDS:
            told_at = time.monotonic()
            say(f"{progress.done} lines, {progress.failed} of them with an error")

    return tell
