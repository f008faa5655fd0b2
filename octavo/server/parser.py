"""A process that parses what would hold the event loop: long bodies, one after the other.

`ParserProcess` is the server's side, `main` the other. The process is started with the first long
body, ends with its parent or when that closes the socket between them, and is started anew when it
has failed. What comes back is small in objects, since reading it holds the loop, too.

    server: length, pickle of (model, content)   ->   parser
    parser: length, pickle of (True, body) or (False, message, param, code)   ->   server
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from octavo.engine.chat_template import ChatRenderer
from octavo.errors import OverloadedError, RequestError
from octavo.server.protocol.decoding import parse_body
from octavo.server.protocol.strict import StrictModel

logger = logging.getLogger(__name__)

PARSE_SECONDS = 60.0
"""Longer than any body of the largest size takes, on a busy machine."""
_LENGTH = struct.Struct("<Q")

Body = TypeVar("Body", bound=StrictModel)


class ParserProcess:
    """The parser of one server, used from its event loop."""

    def __init__(self, renderer: Callable[[], ChatRenderer | None]) -> None:
        """`renderer` is asked when the process starts."""
        self._renderer = renderer
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def parse(self, model: type[Body], content: bytes) -> Body:
        """Returns a body as a `model`, of a chat with its text. Raises RequestError, and
        OverloadedError if the process has failed.

        Bodies have their turns as they come; how many wait is bounded by the room for bodies.
        """
        # A caller that leaves must not leave an answer behind for the next.
        async with self._turn:
            exchange = asyncio.ensure_future(self._exchange((model, content)))
            try:
                reply = await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait([exchange])
                raise
        if reply[0]:
            return reply[1]
        _, message, param, code = reply
        raise RequestError(message, param=param, code=code)

    async def _exchange(self, job: object) -> Any:
        try:
            async with asyncio.timeout(PARSE_SECONDS):
                if self._process is None:
                    await self._start()
                assert self._reader is not None
                await self._send(job)
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                return pickle.loads(await self._reader.readexactly(length))
        except (OSError, EOFError, TimeoutError) as error:
            await self.close()
            logger.error("the parser of long bodies failed; the next one starts another: %r", error)
            raise OverloadedError("the body could not be parsed in time; try again") from error

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "octavo.server.parser", str(theirs.fileno())]
        with theirs:
            # In a session of its own, where Ctrl-C does not reach it: it ends with the socket.
            self._process = await asyncio.to_thread(
                subprocess.Popen,
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        await self._send(self._renderer())

    async def _send(self, message: object) -> None:
        assert self._writer is not None
        data = pickle.dumps(message)
        self._writer.write(_LENGTH.pack(len(data)))
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """Ends the process, if there is one. The next body starts another."""
        process, self._process = self._process, None
        writer, self._writer, self._reader = self._writer, None, None
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.wait)


def main(descriptor: int) -> None:
    """Parses what comes until the socket ends."""
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
        renderer: ChatRenderer | None = _receive(stream)
        with contextlib.suppress(EOFError, OSError):
            while True:
                model, content = _receive(stream)
                data = pickle.dumps(_reply(model, content, renderer))
                stream.write(_LENGTH.pack(len(data)))
                stream.write(data)
                stream.flush()


def _receive(stream: Any) -> Any:
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    return pickle.loads(stream.read(_LENGTH.unpack(head)[0]))


def _reply(
    model: type[StrictModel], content: bytes, renderer: ChatRenderer | None
) -> tuple[object, ...]:
    try:
        return True, parse_body(model, content, renderer)
    except RequestError as error:
        return False, str(error), error.param, error.code


if __name__ == "__main__":
    main(int(sys.argv[1]))
