"""`octavo chat`: a conversation in the terminal, with a running server or a model of its own.

Called by the command line. There is one way to talk: HTTP. Without --url a server is started on a
free port of this machine, with a key that only this chat knows. Never imports torch itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from octavo.cli.options import Parser, Subparsers, add_options, engine_config, say
from octavo.config import EngineConfig
from octavo.errors import ConfigError, OctavoError, RequestError

if TYPE_CHECKING:
    import httpx

HELP = "talk to a model in the terminal"
EXAMPLES = """examples:
  octavo chat                                  with the server on this machine
  octavo chat --url http://host:8000 --api-key KEY
  octavo chat demo-moe --system 'Be brief.'    with a model of its own"""
COMMANDS = "/exit ends, /reset forgets the conversation, /system TEXT sets the system prompt"


def add_parser(subparsers: Subparsers) -> None:
    """Adds `chat`."""
    parser = subparsers.add_parser("chat", help=HELP, description=HELP, epilog=EXAMPLES)
    parser.add_argument("model", metavar="MODEL", nargs="?", help="load this model for the chat")
    _add_talk_options(parser)
    add_options(parser, EngineConfig)
    parser.set_defaults(run=run, parser=parser)


def _add_talk_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--url", metavar="URL", help="talk to this server (default: http://127.0.0.1:8000)")
    add("--api-key", metavar="TEXT", default="", help="key that the server wants")
    add("--served-model", metavar="TEXT", help="model name; the server's first if not given")
    add("--system", metavar="TEXT", help="system prompt")
    add("--temperature", type=float, metavar="FLOAT", help="0 always takes the likeliest token")
    add("--top-p", type=float, metavar="FLOAT", help="share of probability that is drawn from")
    add("--max-tokens", type=int, metavar="INT", help="longest answer")
    add("--no-markdown", action="store_true", help="print answers as they are")


@dataclass(slots=True, kw_only=True)
class Conversation:
    """The messages so far, and what every request of the chat carries."""

    model: str
    sampling: dict[str, Any]
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self) -> dict[str, Any]:
        """Returns the request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {
            "model": self.model,
            "messages": [*system, *self.messages],
            "stream": True,
            **self.sampling,
        }


def run(args: argparse.Namespace) -> int:
    """Talks until /exit or the end of the input."""
    import httpx

    if args.model and args.url:
        raise ConfigError("give either MODEL or --url, not both", field="url")
    sampling = {
        name: value
        for name in ("temperature", "top_p", "max_tokens")
        if (value := getattr(args, name)) is not None
    }
    with contextlib.ExitStack() as stack:
        url, key = args.url or "http://127.0.0.1:8000", args.api_key
        if args.model:
            from octavo.cli.background import background_server

            url, key = stack.enter_context(background_server(engine_config(args)))
        client = stack.enter_context(httpx.Client(**client_options(url, key)))
        model = args.served_model or first_model(client)
        conversation = Conversation(model=model, sampling=sampling, system=args.system)
        has_failed = talk(client, conversation, args)
    return 1 if has_failed and not sys.stdin.isatty() else 0


def talk(client: httpx.Client, conversation: Conversation, args: argparse.Namespace) -> bool:
    """Reads lines and prints answers; an error ends one answer, never the chat.

    Returns whether there was one.
    """
    say(f"{conversation.model}: {COMMANDS}")
    has_failed = False
    while True:
        line = _read_line()
        if line is None or line == "/exit":
            return has_failed
        if line == "/reset":
            conversation.messages.clear()
        elif line.startswith("/system"):
            conversation.system = line.removeprefix("/system").strip() or None
        elif line.startswith("/"):
            say(COMMANDS)
        elif line:
            conversation.messages.append({"role": "user", "content": line})
            try:
                text = _show(_stream(client, conversation.body()), not args.no_markdown)
                conversation.messages.append({"role": "assistant", "content": text})
            except OctavoError as error:
                has_failed = True
                conversation.messages.pop()
                say(f"error: {error}")


def _read_line() -> str | None:
    """Returns the next line, or None at the end of the input or after Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _show(pieces: Generator[str, None, None], markdown: bool) -> str:
    """Prints an answer while it comes; returns what came. Ctrl-C ends the answer only: closing
    the generator ends the request, and the server stops computing it."""
    from rich.console import Console
    from rich.live import Live
    from rich.markdown import Markdown

    console = Console()
    text = ""
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces) as source:
        if not (markdown and console.is_terminal):
            for piece in source:
                text += piece
                print(piece, end="", flush=True)
        else:
            with Live(console=console, vertical_overflow="visible", refresh_per_second=12) as live:
                for piece in source:
                    text += piece
                    live.update(Markdown(text))
    if not (markdown and console.is_terminal):
        print()
    return text


def client_options(url: str, key: str | None) -> dict[str, Any]:
    """Returns what httpx's clients need to speak to the server at `url`, which may be the address
    that OpenAI's clients take: with /v1 at its end."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(600, connect=10)
    base_url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    return {"base_url": base_url, "headers": headers, "timeout": timeout}


def first_model(client: httpx.Client) -> str:
    """Returns the name of the server's first model. Raises ConfigError saying why there is none."""
    import httpx

    try:
        answer = client.get("/v1/models")
        if answer.status_code == 200:
            return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(
            f"no server answers at {client.base_url} ({error}); start one with octavo serve, or "
            "give another --url",
            field="url",
        ) from error
    raise ConfigError(f"{client.base_url}: {_message(answer)}", field="url")


def event_of(line: str) -> dict[str, Any]:
    """Returns the event in a line of a stream, empty where there is none."""
    is_event = line.startswith("data: ") and line != "data: [DONE]"
    return json.loads(line[6:]) if is_event else {}


def _stream(client: httpx.Client, body: dict[str, Any]) -> Generator[str, None, None]:
    """Yields pieces of the answer's text. Raises RequestError with the server's message."""
    import httpx

    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise RequestError(_message(answer))
            for line in answer.iter_lines():
                event = event_of(line)
                if "error" in event:
                    raise RequestError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices", ()):
                    yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise OctavoError(f"the server went away: {error or type(error).__name__}") from error


def _message(answer: httpx.Response) -> str:
    """Returns the text of an OpenAI error object, or of whatever came."""
    if answer.status_code == 401:
        return "HTTP 401: the server wants a key; give it with --api-key KEY"
    try:
        return f"HTTP {answer.status_code}: {answer.json()['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}: {answer.text[:300]}"
