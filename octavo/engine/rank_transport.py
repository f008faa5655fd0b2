"""How the ranks of an engine are started and spoken to: processes of this host, or elsewhere.

Used by the executor, which knows ranks as connections that carry pickled plans, and by nobody else.
`LocalRanks` starts processes that end with this one; `RemoteRanks` says where it can be reached and
waits for ranks that somebody else starts, on this host or on others: Ray actors, `octavo rank`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Collection
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import NamedTuple, Protocol, TypeVar

from octavo.engine.spawn import start_child
from octavo.errors import ConfigError, EngineDeadError
from octavo.version import __version__

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOCAL_HOST = "127.0.0.1"
ARRIVAL_SECONDS = 120.0
"""How long ranks get to be started and to come."""
KEY_BYTES = 32
GREETING_SECONDS = 5
MAX_GREETING_BYTES = 1024
RETRY_SECONDS = 0.5


class RankProcess(Protocol):
    """One rank that was started."""

    connection: Connection

    def wait(self, seconds: float) -> str | None:
        """Returns how it ended, for people, or None if it has not after so long."""
        ...

    def kill(self) -> None:
        """Ends it; may be called again."""
        ...

    def close(self) -> None:
        """Lets go of what has ended."""
        ...


class RankTransport(Protocol):
    """Starts ranks."""

    host: str
    """Where the ranks find rank 0, which is in this process."""

    def start(self, size: int, first_device: int) -> list[tuple[RankProcess, int]]:
        """Starts ranks 1 to size - 1; returns each with the index of its GPU among those that it
        sees. Raises EngineDeadError naming those that did not come."""
        ...


class LocalRank:
    """A process of this host, which ends with this one."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            number = theirs.fileno()
            # Not through multiprocessing, which would run the user's main module again.
            self._process, self._lifeline = start_child(
                "octavo.engine.rank", str(number), descriptors=(number,)
            )
        self.connection: Connection = ours

    def wait(self, seconds: float) -> str | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return f"ended with code {self._process.wait(seconds)}"
        return None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        self.connection.close()
        os.close(self._lifeline)


class LocalRanks:
    """Ranks of this host, each with a GPU of its own."""

    host = LOCAL_HOST

    def start(self, size: int, first_device: int) -> list[tuple[RankProcess, int]]:
        return [(LocalRank(), first_device + rank) for rank in range(1, size)]


class RemoteRank:
    """A rank at the other end of a TCP connection; whoever has started it ends it."""

    def __init__(self, connection: Connection, peer: str) -> None:
        self.connection = connection
        self._peer = peer

    def wait(self, seconds: float) -> str | None:
        return f"at {self._peer} has left or cannot be reached any more"

    def kill(self) -> None:
        """Without its connection it ends by itself."""
        with (
            contextlib.suppress(OSError),  # it is closed already
            socket.socket(fileno=os.dup(self.connection.fileno())) as end,
        ):
            end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.connection.close()


Announce = Callable[[str, bytes], None]
"""Is told the address (host:port) to come to, and the key that lets a rank in."""


class RemoteRanks:
    """Ranks that come to an address of this host."""

    def __init__(
        self,
        host: str,
        announce: Announce,
        arrival_seconds: float = ARRIVAL_SECONDS,
        *,
        port: int = 0,
        key: bytes | None = None,
    ) -> None:
        """`announce` has the ranks started; it must not wait for them. Any free port and a new key,
        if not given."""
        self.host = host
        self._announce = announce
        self._seconds = arrival_seconds
        self._port = port
        self._key = key or secrets.token_bytes(KEY_BYTES)

    def start(self, size: int, first_device: int) -> list[tuple[RankProcess, int]]:
        try:
            server = socket.create_server((self.host, self._port))
        except OSError as error:
            where = f"{self.host}:{self._port}" if self._port else self.host
            message = (
                f"ranks cannot come to {where}: {error.strerror}; is it of this host and free?"
            )
            raise ConfigError(message, field="rank_address") from error
        with server:
            address = f"{self.host}:{server.getsockname()[1]}"
            self._announce(address, self._key)
            found: dict[int, RemoteRank] = {}
            strangers: set[str] = set()
            deadline = time.monotonic() + self._seconds
            while len(found) < size - 1:
                server.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    end, peer = server.accept()
                except TimeoutError:
                    for rank in found.values():
                        rank.close()
                    raise EngineDeadError(_missing(size, found, address, self._seconds)) from None
                come = _let_in(end, self._key)
                if come is None:
                    if peer[0] not in strangers:
                        logger.warning("%s is not let in: it does not know the key", peer[0])
                    strangers.add(peer[0])
                    continue
                rank, connection = come
                refusal = _refusal(rank, size, found.keys())
                connection.send_bytes(refusal.encode())
                if not refusal:
                    found[rank.number] = RemoteRank(connection, f"{peer[0]}:{peer[1]}")
                else:
                    logger.error("rank %d at %s is refused: %s", rank.number, peer[0], refusal)
                    connection.close()
        # Elsewhere a rank sees its own GPU alone.
        return [(found[rank], 0) for rank in range(1, size)]


def _missing(size: int, found: dict[int, RemoteRank], address: str, seconds: float) -> str:
    missing = [str(rank) for rank in range(1, size) if rank not in found]
    return (
        f"rank {', '.join(missing)} of {size} did not come to {address} within {seconds:g} s; "
        "are they started, and can they reach this address and port?"
    )


class _Greeting(NamedTuple):
    """What a rank says of itself."""

    number: int
    version: str


def _refusal(rank: _Greeting, size: int, found: Collection[int]) -> str:
    """Returns why a rank is not let in; empty if it is."""
    if rank.version != __version__:
        return f"it runs Octavo {rank.version}, rank 0 {__version__}; install the same on all hosts"
    if not 1 <= rank.number < size:
        return f"rank {rank.number} is not one of 1 to {size - 1} (tensor_parallel_size {size})"
    if rank.number in found:
        return f"rank {rank.number} is there already; give each its own --rank"
    return ""


_NOT_GREETED = (AuthenticationError, AssertionError, EOFError, OSError, ValueError)
"""What comes of whoever does not know the key, or speaks of something else."""


def _let_in(end: socket.socket, key: bytes) -> tuple[_Greeting, Connection] | None:
    """Returns what a rank says and its connection, None for whoever does not know the key."""

    def greeted(connection: Connection) -> _Greeting:
        deliver_challenge(connection, key)
        answer_challenge(connection, key)
        number, _, version = connection.recv_bytes(MAX_GREETING_BYTES).decode().partition(" ")
        return _Greeting(int(number), version)

    try:
        return _greeted(end, GREETING_SECONDS, greeted)
    except _NOT_GREETED:
        return None


def _greeted(
    end: socket.socket, seconds: float, greet: Callable[[Connection], T]
) -> tuple[T, Connection]:
    """Returns what `greet` does of a connection whose other end gets so many seconds for each word:
    whoever says nothing must not keep others waiting. Raises what `greet` does."""
    end.settimeout(None)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    _hear_for(end, seconds)
    other = socket.socket(fileno=os.dup(end.fileno()))
    connection = Connection(end.detach())
    try:
        found = greet(connection)
        _hear_for(other, 0)
    except BaseException:
        connection.close()
        raise
    finally:
        other.close()
    return found, connection


def _hear_for(end: socket.socket, seconds: float) -> None:
    """Has reading fail after so long; 0: never."""
    whole = int(seconds)
    limit = struct.pack("ll", whole, int(1e6 * (seconds - whole)))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)


def join(address: str, key: bytes, rank: int, seconds: float = ARRIVAL_SECONDS) -> Connection:
    """Returns the connection of a rank that was started elsewhere to rank 0 at host:port, which may
    be started later.

    Raises EngineDeadError if nobody is there in time, or the key is not theirs, and ConfigError if
    rank 0 refuses this one.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds

    def greeted(connection: Connection) -> str:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
        connection.send_bytes(f"{rank} {__version__}".encode())
        return connection.recv_bytes(MAX_GREETING_BYTES).decode()

    try:
        end = _connected((host, int(port)), deadline)
    except OSError as error:
        raise EngineDeadError(
            f"rank {rank} does not reach rank 0 at {address} within {seconds:g} s: {error}"
        ) from error
    try:
        left = max(deadline - time.monotonic(), GREETING_SECONDS)
        refusal, connection = _greeted(end, left, greeted)
    except AuthenticationError as error:
        message = f"rank {rank} is not let in by rank 0 at {address}: its key is another"
        raise EngineDeadError(message) from error
    except _NOT_GREETED as error:
        raise EngineDeadError(
            f"rank {rank} reaches {address}, but who is there does not speak as rank 0 does "
            f"({type(error).__name__}); is it the --rank-address of octavo serve?"
        ) from error
    if refusal:
        raise ConfigError(f"rank 0 at {address} refuses rank {rank}: {refusal}", field="rank")
    return connection


def _connected(where: tuple[str, int], deadline: float) -> socket.socket:
    """Tries until rank 0 listens. Raises OSError."""
    while True:
        left = max(deadline - time.monotonic(), 0.01)
        try:
            return socket.create_connection(where, timeout=left)
        except ConnectionRefusedError:
            if time.monotonic() + RETRY_SECONDS > deadline:
                raise
            time.sleep(RETRY_SECONDS)
