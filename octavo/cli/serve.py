"""`octavo serve`: the OpenAI-compatible server in the foreground.

Called by the command line, which has started the process of the engine (it imports meanwhile).
Order: check the options, take the port, load the model, print the memory plan, the URL and an
example, and serve until Ctrl-C; whoever asks while the model loads gets a 503. Never imports torch;
FastAPI once the options are known to be good.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from octavo.cli.options import (
    Parser,
    Subparsers,
    add_options,
    engine_config,
    say,
    server_config,
)
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError, EngineDeadError
from octavo.vllm_options import log_verdicts

if TYPE_CHECKING:
    import socket

    from octavo.async_llm import AsyncLLM
    from octavo.engine.child import EngineProcess
    from octavo.engine.spawn import HeadStart
    from octavo.server.signals import StopSignals

logger = logging.getLogger(__name__)

HELP = "serve a model over HTTP with the OpenAI API"
EXAMPLES = """examples:
  octavo serve demo-moe                        on http://127.0.0.1:8000
  octavo serve MODEL --host 0.0.0.0 --port 80 --api-key KEY
  octavo serve MODEL --tensor-parallel-size 2 --max-model-len 32K --served-model-name chat"""
LEAVE_SECONDS = 2.0
"""What the process gets to end when all has ended that anybody waits for."""


class Sockets(NamedTuple):
    """The ports that are taken before the model is loaded."""

    api: socket.socket
    metrics: socket.socket | None


def add_parser(subparsers: Subparsers) -> None:
    """Adds `serve` with all options of engine and server."""
    parser = subparsers.add_parser("serve", help=HELP, description=HELP, epilog=EXAMPLES)
    add_model(parser)
    add_options(parser, ServerConfig)
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser, begun=None)


def add_model(parser: Parser) -> None:
    """Adds the positional MODEL."""
    what = "Hugging Face id, local folder, .gguf file, demo or demo-moe"
    parser.add_argument("model", metavar="MODEL", help=what)


def run(args: argparse.Namespace) -> int:
    """Serves until a signal; returns 0 after a clean end, 1 if the engine died."""
    from octavo.server.signals import StopSignals

    signals = StopSignals()
    signals.install()
    begun: HeadStart | None = args.begun
    try:
        server, engine = server_config(args), engine_config(args)
    except ConfigError:
        if begun is not None:
            begun.end()
        raise
    gc.disable()  # Until the server serves, what is made stays (`settle_memory`).
    try:
        return _run_in_loop(server, engine, signals, args)
    finally:
        gc.enable()


def _run_in_loop(
    server: ServerConfig, engine: EngineConfig, signals: StopSignals, args: argparse.Namespace
) -> int:
    from octavo.observe.logs import configure_logging

    configure_logging(server.log_format, server.log_level, owns_stderr=True)
    import asyncio

    from octavo.server.event_loop import new_event_loop

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        code = runner.run(_run(server, engine, signals, args))
        _leave_soon(code)
    return code


async def _run(
    server: ServerConfig, config: EngineConfig, signals: StopSignals, args: argparse.Namespace
) -> int:
    from octavo.engine.child import EngineProcess

    begun: HeadStart | None = args.begun
    process = None
    if config.data_parallel_size == 1:
        process = EngineProcess(begun)
    elif begun is not None:
        begun.end()  # a fleet starts its own
    try:
        from octavo.server.serve import bind, bind_metrics

        # The port first: a model takes long to load, only to find that nobody can reach it.
        with bind(server) as bound, bind_metrics(server) as metrics_bound:
            log_verdicts(args.verdicts)
            return await _serve(server, config, Sockets(bound, metrics_bound), signals, process)
    finally:
        if process is not None:
            await process.end()


def _leave_soon(code: int) -> None:
    """Ends the process even if a thread is still busy with what nobody waits for any more."""
    import threading

    timer = threading.Timer(LEAVE_SECONDS, os._exit, (code,))
    timer.daemon = True
    timer.start()


async def _serve(
    server: ServerConfig,
    config: EngineConfig,
    sockets: Sockets,
    signals: StopSignals,
    process: EngineProcess | None,
) -> int:
    import asyncio

    from octavo.server.loading import LoadingPorts

    loading = LoadingPorts(server)
    loading.open(sockets.api, sockets.metrics)
    # In a thread: probes are answered meanwhile.
    await asyncio.to_thread(import_module, "octavo.async_llm")
    from octavo.async_llm import AsyncLLM
    from octavo.engine.client import EngineClient
    from octavo.server.fronts import Fronts
    from octavo.server.serve import serve, settle_memory, url_of

    fronts = None
    if server.api_processes > 1:
        fronts = Fronts(server, config, sockets.metrics, process)
    connect = None if process is None else partial(EngineClient, process=process)
    engine = AsyncLLM(
        config,
        log_format=server.log_format,
        log_level=server.log_level,
        connect=connect if fronts is None else fronts.connect,
    )
    say(f"loading {engine.model_name} ...")
    try:
        if not await _start(engine, signals):
            return signals.exit_code
        url = url_of(sockets.api, "https" if server.ssl_certfile else "http")
        metrics_url = sockets.metrics and url_of(sockets.metrics)

        def on_serving() -> None:
            loading.close()  # Only now: nobody finds a port that nothing answers.
            announce(engine, server, url, metrics_url)

        try:
            if fronts is None:
                await serve(engine, server, sockets.api, signals, sockets.metrics, on_serving)
            else:
                settle_memory()
                await fronts.serve(engine, sockets.api, signals, on_serving)
        except EngineDeadError:
            return 1  # which the log has told
        return 0
    finally:
        loading.close()
        # Whoever has lost patience, or does so now, does not wait for the engine.
        signals.listen(engine.kill)
        if signals.num_received > 1:
            engine.kill()
        await engine.close()
        if fronts is not None:
            await fronts.close()


async def _start(engine: AsyncLLM, signals: StopSignals) -> bool:
    """Returns whether the engine is started, or False at once when a signal comes first."""
    import asyncio

    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    signals.listen(lambda: loop.call_soon_threadsafe(stopped.set))
    starting = asyncio.ensure_future(engine.start())
    stopping = asyncio.ensure_future(stopped.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if stopped.is_set():
        starting.cancel()
        await asyncio.wait({starting})
        return False
    stopping.cancel()
    starting.result()
    return True


def announce(
    engine: AsyncLLM, server: ServerConfig, url: str, metrics_url: str | None = None
) -> None:
    """Prints the memory plan, the URLs and a request to copy; one line if lines are JSON."""
    from octavo.kv_cache.plan_text import describe

    name = (server.served_model_name or (engine.model_name,))[0]
    body = {
        "model": name,
        "messages": [{"role": "user", "content": "Why is the sky blue?"}],
        "max_tokens": 100,
    }
    key = " -H 'Authorization: Bearer YOUR_KEY'" if server.has_keys else ""
    key += " --cacert CERTIFICATE" if server.ssl_certfile else ""
    if server.log_format == "json":
        facts = {"url": url, "model": name, "memory_plan": describe(engine.plan)}
        if metrics_url is not None:
            facts["metrics_url"] = f"{metrics_url}/metrics"
        logger.info("%s is served on %s", name, url, extra=facts)
        return
    say(describe(engine.plan))
    say(f"\n{name} is served on {url}  (Ctrl-C ends it). Try:\n")
    say(
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \\\n"
        f"    -d '{json.dumps(body)}'\n"
    )
    if metrics_url is not None:
        say(f"Metrics and probes without a key: {metrics_url}/metrics\n")
