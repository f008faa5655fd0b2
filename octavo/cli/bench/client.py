"""A client whose streams take completions from a server and note when tokens arrive.

Run by `bench.client_process`, once for each of --clients. So light that it is not what is
measured: no HTTP library but a parser in C, one look at the clock for all that came at once.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

READ_SECONDS = 600.0
"""How long a server may be silent within an answer."""
CONNECT_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go, and what they say beside their prompts."""

    url: str
    """Of the route, with scheme, host and port."""
    api_key: str | None
    body: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One request to send."""

    prompt: list[int] | str
    max_tokens: int
    at: float = 0.0
    """Not before so many seconds after the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one process sends: each of its streams takes the next shot when its answer ended."""

    target: Target
    shots: Sequence[Shot]
    num_streams: int


@dataclass(slots=True, kw_only=True)
class Served:
    """What the client saw of one request. Times are seconds of the machine's monotonic clock."""

    started: float
    token_times: array[float] = field(default_factory=lambda: array("d"))
    """One for each event with text."""
    finished: float = 0.0
    is_first_of_stream: bool = False
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.started

    @property
    def tpot(self) -> float:
        """Time after the first token over the tokens after the first."""
        return (self.finished - self.token_times[0]) / max(self.num_output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        times = self.token_times
        return [times[i] - times[i - 1] for i in range(1, len(times))]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientResult:
    """What one process of clients did."""

    served: list[Served]
    cpu_share: float
    """Of one core, between the first request and the last answer."""


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    """What of an event is looked at; the rest is skipped without being made."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Event)


class Connection(asyncio.Protocol):
    """One connection to the server, which sends one request after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._served = Served(started=0.0)
        self._done: asyncio.Future[None] | None = None
        self._buffer = b""
        self._refusal = bytearray()
        self._now = 0.0
        self._silence: asyncio.TimerHandle | None = None
        self._ends_with_connection = True
        self.is_open = False

    async def send(self, request: bytes) -> Served:
        """Sends one request and returns what came, at the end of the answer."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._buffer = b""
        self._refusal.clear()
        self._done = self._loop.create_future()
        self._served = served = Served(started=time.monotonic())
        self._ends_with_connection = True
        self._transport.write(request)
        self._check_silence()
        try:
            await self._done
        finally:
            assert self._silence is not None
            self._silence.cancel()
            self._done = None
        served.finished = time.monotonic()
        if served.error is None and not served.token_times:
            served.error = "the stream ended without a token"
        return served

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _check_silence(self) -> None:
        """Ends an answer that has been silent for too long; looks again later at others."""
        last = max(self._now, self._served.started)
        left = last + READ_SECONDS - time.monotonic()
        self._silence = self._loop.call_later(max(left, 0), self._check_silence)
        if left <= 0:
            self._silence.cancel()
            self._end(f"the server said nothing for {READ_SECONDS:.0f} s")
            self.close()

    def _end(self, error: str | None = None) -> None:
        """Ends the answer that is under way, if one is."""
        if self._done is None or self._done.done():
            return
        if error is not None and self._served.error is None:
            self._served.error = error
        self._done.set_result(None)

    # -- asyncio's side ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no HTTP answer: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        if exc is None and self._ends_with_connection and self._parser.get_status_code():
            self.on_message_complete()
        self._end(f"the connection was lost: {exc or 'the server closed it'}")

    # -- the parser's side ---------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._ends_with_connection = False

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self._refusal += body
            return
        *events, self._buffer = (self._buffer + body).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            if event.startswith(b"data:") and not event.endswith(b"[DONE]"):
                self._read(event[5:])

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        error = None
        if status != 200:
            error = f"HTTP {status}: {self._refusal[:300].decode(errors='replace')}"
        is_kept = self._parser.should_keep_alive()
        self._end(error)
        if not is_kept:
            self.is_open = False
            self.close()

    def _read(self, data: bytes) -> None:
        served = self._served
        try:
            event = _DECODER.decode(data)
        except msgspec.DecodeError as error:
            served.error = f"an event could not be read: {error}"
            return
        if event.error is not None:
            served.error = str(event.error)
        for choice in event.choices:
            # The last token may have no text of its own, as the first may; the end counts then.
            if choice.text or (choice.finish_reason and not served.token_times):
                served.token_times.append(self._now)
                break
        if event.usage is not None:
            served.num_prompt_tokens = event.usage.prompt_tokens
            served.num_output_tokens = event.usage.completion_tokens
            details = event.usage.prompt_tokens_details
            served.num_cached_tokens = (details and details.cached_tokens) or 0


class Client:
    """All streams of one process."""

    def __init__(self, load: Load, tell: Callable[[int], None]) -> None:
        """`tell` is called with 1 for each request that ended."""
        self._tell = tell
        self._num_streams = min(load.num_streams, len(load.shots))
        self._todo = deque((shot.at, request_bytes(load.target, shot)) for shot in load.shots)
        self._served: list[Served] = []
        parts = urlsplit(load.target.url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)

    async def run(self, wait_for_start: Callable[[], float]) -> list[Served]:
        """Connects, waits for the start, whose time it is told, and sends everything."""
        # Those of later may be closed as idle until then.
        streams = self._num_streams if all(at == 0 for at, _ in self._todo) else 0
        opened = list(await asyncio.gather(*(self._connect() for _ in range(streams))))
        start = await asyncio.to_thread(wait_for_start)
        opened += [None] * (self._num_streams - streams)
        await asyncio.gather(*(self._stream(connection, start) for connection in opened))
        return self._served

    async def _connect(self) -> Connection | None:
        """Returns a connection, or None if there is none to be had; the request will say why."""
        loop = asyncio.get_running_loop()
        made = loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        try:
            _, connection = await asyncio.wait_for(made, CONNECT_SECONDS)
        except OSError:
            return None
        return connection

    async def _stream(self, connection: Connection | None, start: float) -> None:
        is_first = True
        while self._todo:
            at, request = self._todo.popleft()
            await asyncio.sleep(max(start + at - time.monotonic(), 0))
            if connection is None or not connection.is_open:
                connection = await self._connect()
            if connection is None:
                now = time.monotonic()
                error = f"no connection to {self._host}:{self._port}"
                served = Served(started=now, finished=now, error=error)
            else:
                served = await connection.send(request)
            served.is_first_of_stream = is_first
            is_first = False
            self._served.append(served)
            self._tell(1)
        if connection is not None:
            connection.close()


def request_bytes(target: Target, shot: Shot) -> bytes:
    """Returns a request as it goes over the wire."""
    body = {**target.body, "prompt": shot.prompt, "max_tokens": shot.max_tokens}
    content = msgspec.json.encode(body)
    parts = urlsplit(target.url)
    lines = [
        f"POST {parts.path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    ]
    if target.api_key:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode() + content


def run_client(
    load: Load, tell: Callable[[int], None], wait_for_start: Callable[[], float]
) -> ClientResult:
    """Sends a load to its end, in this process."""
    client = Client(load, tell)
    began = [0.0, 0.0]

    def wait() -> float:
        start = wait_for_start()
        began[:] = [time.monotonic(), time.process_time()]
        return start

    gc.collect()
    gc.freeze()
    gc.disable()  # Nothing here makes cycles, and a pause would be the server's in the figures.
    try:
        served = asyncio.run(client.run(wait))
    finally:
        gc.enable()
        gc.unfreeze()
    seconds = time.monotonic() - began[0]
    return ClientResult(
        served=served, cpu_share=(time.process_time() - began[1]) / max(seconds, 1e-9)
    )
