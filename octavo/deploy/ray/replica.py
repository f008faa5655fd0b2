"""One engine as a replica: token ids in, deltas out, and what it holds to whoever looks.

Wrapped by `app` into a deployment of Ray Serve; knows nothing of Ray itself. Ingresses call it by
its name, which they learn from `look`; a call that is another's is answered without being done.

    generate          one stream a request; its end or its cancellation ends the request
    look              what an ingress must know to route: at the first time everything, then news
    check_health      fails once the engine is dead, or makes no progress (`engine.watchdog`)
    record_autoscaling_stats   what `autoscaling` decides by
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import msgspec

from octavo.config import EngineConfig
from octavo.deploy.ray.messages import Look, kind_of, moved
from octavo.engine.client import EngineClient, RemoteStart
from octavo.engine.front_end import FrontEnd
from octavo.engine.ipc import Answer, Deltas, Explained, Held, Refused, encode
from octavo.errors import EngineDeadError, OctavoError
from octavo.fleet.news import NewsLog
from octavo.request import Request, TokenDelta
from octavo.weights.fingerprint import with_fingerprint

_decode_request = msgspec.msgpack.Decoder(Request).decode
KV_USE = "kv_use"
"""Of the statistics for autoscaling: used blocks over all blocks, 0 to 1."""


class _Stream:
    """What was told of one request and not yet passed on."""

    def __init__(self, num_sequences: int, shift: float) -> None:
        self._num_running = num_sequences
        self._shift = shift
        self._waiting: list[TokenDelta] = []
        self._last: bytes | EngineDeadError | None = None
        self._news = asyncio.Event()

    def put(self, delta: TokenDelta) -> None:
        self._waiting.append(_shifted(delta, self._shift))
        self._num_running -= delta.finish_reason is not None
        self._news.set()

    def end(self, last: bytes | EngineDeadError) -> None:
        """There is nothing more to come but this."""
        self._last = last
        self._news.set()

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """Yields what has come since, until all sequences have ended. Raises EngineDeadError."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._waiting:
                deltas, self._waiting = self._waiting, []
                yield encode(Deltas(deltas))
            if isinstance(self._last, EngineDeadError):
                raise self._last
            if self._last is not None:
                yield self._last
            if self._last is not None or not (self._num_running or self._waiting):
                return


def _shifted(delta: TokenDelta, seconds: float) -> TokenDelta:
    """Returns a delta whose times are those of a clock that is so much behind."""
    if delta.scheduled_time is None and not delta.moments:
        return delta
    scheduled = delta.scheduled_time
    moments = tuple(
        msgspec.structs.replace(
            one, start=one.start - seconds, end=one.end - seconds if one.end else 0.0
        )
        for one in delta.moments
    )
    return msgspec.structs.replace(
        delta,
        scheduled_time=None if scheduled is None else scheduled - seconds,
        moments=moments,
    )


class EngineReplica:
    """One engine process, and its streams."""

    async def start(
        self, name: str, config: EngineConfig, log: tuple[str, str], ranks: RemoteStart | None
    ) -> None:
        """Loads the model; `ranks` starts those of tensor parallelism but the first. Raises
        OctavoError."""
        self._name = name
        found = (await asyncio.to_thread(FrontEnd, config)).files
        files = await asyncio.to_thread(with_fingerprint, found)
        self._kind = kind_of(config, files)
        self._streams: dict[str, _Stream] = {}
        self._num_open = 0
        self._client = EngineClient(self, on_held=self._on_held, remote_ranks=ranks)
        self._early: list[Held] | None = []
        self._plan = await self._client.start(config, files, *log)
        self._news = NewsLog(self._plan.num_blocks)
        for held in self._early:
            self._note(held)
        self._early = None

    # -- what ingresses call -------------------------------------------------------------------

    async def generate(self, name: str, data: bytes) -> AsyncGenerator[bytes, None]:
        """Yields messages of `engine.ipc`: Deltas, or one Refused. Raises EngineDeadError."""
        request = _decode_request(data)
        request_id = request.request_id
        if name != self._name or request_id in self._streams:
            yield moved(request_id)
            return
        # The clocks of two hosts have nothing to do with each other.
        now = time.monotonic()
        stream = _Stream(request.params.n, now - request.arrival_time)
        self._streams[request_id] = stream
        try:
            self._client.link.add(msgspec.structs.replace(request, arrival_time=now))
            async for message in stream.messages():
                yield message
            del self._streams[request_id]
        finally:  # cancelled, or dead
            if self._streams.pop(request_id, None) is not None:
                self._client.link.abort(request_id)

    async def abort(self, name: str, request_id: str, index: int | None) -> None:
        if name == self._name:
            self._client.link.abort(request_id, index)

    async def look(self, numbers: dict[str, int]) -> bytes:
        """Returns a Look; `numbers` are those of the news that the ingress knows, by replica."""
        news = self._news.since(numbers.get(self._name))
        return encode(
            Look(
                replica=self._name,
                kind=self._kind,
                plan=self._plan,
                num_open=self._num_open,
                number=news.number,
                is_whole=news.is_whole,
                stored=news.stored,
                removed=news.removed,
            )
        )

    async def stats(self, name: str, is_detailed: bool) -> bytes:
        """Returns an Answer. So do the next two."""
        self._check_name(name)
        return encode(Answer(0, await self._client.link.stats(is_detailed)))

    async def reset_prefix_cache(self, name: str) -> bytes:
        self._check_name(name)
        return encode(Answer(0, await self._client.link.reset_prefix_cache()))

    async def explain_prefix(self, name: str, data: bytes) -> bytes:
        self._check_name(name)
        return encode(Explained(0, await self._client.link.explain_prefix(_decode_request(data))))

    def _check_name(self, name: str) -> None:
        if name != self._name:
            raise EngineDeadError(f"replica {name} takes no requests any more")

    # -- what Ray Serve calls --------------------------------------------------------------------

    async def check_health(self) -> None:
        """Raises EngineDeadError; Ray Serve then starts the replica again."""
        error = self._client.link.error
        if error is not None:
            raise error

    async def record_autoscaling_stats(self) -> dict[str, float]:
        try:
            stats = await self._client.link.stats()
        except EngineDeadError:
            return {KV_USE: 0.0}
        return {KV_USE: stats.num_used_blocks / max(stats.num_blocks, 1)}

    async def close(self) -> None:
        await self._client.close()

    # -- news of the engine ----------------------------------------------------------------------

    def on_deltas(self, message: Deltas) -> None:
        for delta in message.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is not None:
                stream.put(delta)

    def on_failed(self, request_id: str, error: OctavoError) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.end(encode(Refused(request_id, str(error))))

    def on_death(self, error: EngineDeadError) -> None:
        for stream in self._streams.values():
            stream.end(error)

    def _on_held(self, held: Held) -> None:
        if self._early is not None:
            self._early.append(held)
        else:
            self._note(held)

    def _note(self, held: Held) -> None:
        self._num_open = held.num_open
        self._news.note(held.stored, held.removed, held.is_cleared)
