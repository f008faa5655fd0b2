"""What a request and a token cost the front's own code: CPU time without sockets and an engine.

    python benchmarks/front_costs.py MODEL [--cases 64x512+128] [--profile] [engine options]

One process: the server's app, protocol and AsyncLLM as they are, over connections that take all
bytes and an engine's link that is fed with encoded messages. A round is a request of every stream
and its tokens; the least of all rounds is printed, which a busy machine changes least.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import random
import re
import time
from typing import Any

import msgspec
import uvicorn
from synthetic_engine import plan_of
from uvicorn.server import ServerState

from octavo.async_llm import AsyncLLM
from octavo.cli.commands import build_parser
from octavo.cli.options import config_values
from octavo.config import EngineConfig, ServerConfig
from octavo.engine.ipc import Deltas, decode_from_engine, encode
from octavo.engine.link import LinkOwner
from octavo.engine.process import EngineArguments
from octavo.request import FinishReason, Request, TokenDelta
from octavo.server.app import create_app
from octavo.server.event_loop import new_event_loop
from octavo.server.http_protocol import ConnectionLimits, protocol_factory
from octavo.server.serve import settle_memory


class Client:
    """Stands in for the engine's process and for the link to it."""

    prefix = "0-"
    error = None

    def __init__(self, owner: LinkOwner) -> None:
        self.link: Any = self
        self.requests: list[Request] = []
        self._owner = owner

    async def start(self, config: EngineConfig, files: Any, *_: str) -> Any:
        arguments = EngineArguments(
            config=config, files=files, log_format="text", log_level="warning"
        )
        return plan_of(arguments)

    def add(self, request: Request) -> None:
        encode(request)
        self.requests.append(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        raise AssertionError("no request is aborted")

    def receive(self, data: bytes) -> None:
        message = decode_from_engine(data)
        assert isinstance(message, Deltas)
        self._owner.on_deltas(message)

    async def close(self) -> None: ...


class Connection(asyncio.Transport):
    """A client's end that takes everything."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.num_writes = 0
        self.last = b""

    def write(self, data: Any) -> None:
        self.num_writes += 1
        self.last = data

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def is_closing(self) -> bool:
        return False

    def close(self) -> None: ...


class Clock:
    """Adds up the CPU time of what runs inside `with`."""

    def __init__(self, cools: bool, profile: cProfile.Profile | None = None) -> None:
        self.seconds = 0.0
        self._profile = profile
        self._room = bytearray(8 * 2**20) if cools else b""

    def __enter__(self) -> None:
        if self._room:
            self._room = bytearray(self._room)  # What the front had in its caches is gone.
        if self._profile is not None:
            self._profile.enable()
        self._began = time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.thread_time() - self._began
        if self._profile is not None:
            self._profile.disable()


class Front:
    """The server's side of a few connections."""

    def __init__(self, llm: AsyncLLM, client: Client, args: argparse.Namespace) -> None:
        self._client = client
        self._chat, self._cools, self._together = args.chat, args.cold, args.together
        app = create_app(llm, ServerConfig(log_level="warning"))
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        config.load()
        state, factory = ServerState(), protocol_factory(ConnectionLimits())
        self._new_protocol = lambda: factory(config=config, server_state=state, app_state={})
        self._draw = random.Random(0)
        self._model = llm.model_name
        # An event for each token, so that all can be waited for.
        texts = llm.tokenizer.whole_texts
        self._tokens = [one for one in range(300, 8000) if texts[one] is not None]
        self._connections: list[tuple[Any, Connection]] = []

    def connect(self, count: int) -> None:
        while len(self._connections) < count:
            protocol, connection = self._new_protocol(), Connection()
            protocol.connection_made(connection)
            self._connections.append((protocol, connection))

    def _body(self, input_len: int, output_len: int) -> dict[str, Any]:
        ids = [self._draw.randrange(300, 8000) for _ in range(input_len)]
        given: dict[str, Any] = {"prompt": ids}
        if self._chat:
            words = " ".join(str(one) for one in ids[: input_len // 4])
            given = {"messages": [{"role": "user", "content": words}]}
        return given | {
            "model": self._model,
            "temperature": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
            "max_tokens": output_len,
        }

    async def round(self, case: tuple[int, int, int], profile: Any = None) -> tuple[float, float]:
        """Returns the seconds of a request, without its tokens, and of a token."""
        streams, input_len, output_len = case
        path = b"/v1/chat/completions" if self._chat else b"/v1/completions"
        sent = []
        for _ in range(streams):
            body = msgspec.json.encode(self._body(input_len, output_len))
            head = b"POST %b HTTP/1.1\r\nHost: x:1\r\nContent-Type: application/json\r\n" % path
            sent.append(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._client.requests.clear()
        self.connect(streams)
        clock = Clock(self._cools, profile)
        for count, ((protocol, _), data) in enumerate(zip(self._connections, sent, strict=False)):
            with clock:
                protocol.data_received(data)
                if self._cools:
                    await self._settled(lambda n=count + 1: len(self._client.requests) == n)
        with clock:
            await self._settled(lambda: len(self._client.requests) == streams)
        await self._tell(0, output_len, clock)
        tokens = Clock(self._cools)
        for place in range(1, output_len - 1, self._together):
            await self._tell(place, output_len, tokens, min(self._together, output_len - 1 - place))
        await self._tell(output_len - 1, output_len, clock)
        for _, connection in self._connections[:streams]:
            assert connection.last.endswith(b"0\r\n\r\n"), connection.last
        token = tokens.seconds / (output_len - 2) / streams
        return clock.seconds / streams - 2 * token, token

    async def _tell(self, place: int, output_len: int, clock: Clock, num_steps: int = 1) -> None:
        """A step of the engine, or several before the front looks: a token of every request."""
        is_last = place == output_len - 1
        token = (self._draw.choice(self._tokens),)
        deltas = [
            TokenDelta(
                request_id=request.request_id,
                index=0,
                token_ids=token,
                finish_reason=FinishReason.LENGTH if is_last else None,
                scheduled_time=1.0,
            )
            for request in self._client.requests
        ]
        data, before = encode(Deltas(deltas)), self._num_writes()
        del deltas
        wanted = before + len(self._client.requests)
        with clock:
            for _ in range(num_steps):
                self._client.receive(data)
            await self._settled(lambda: self._num_writes() >= wanted)

    def _num_writes(self) -> int:
        return sum(connection.num_writes for _, connection in self._connections)

    async def _settled(self, is_done: Any) -> None:
        """Lets the loop run until nothing is left to do."""
        for _ in range(2000):
            await asyncio.sleep(0)
            if is_done():
                break
        else:
            await asyncio.sleep(0.01)
            assert is_done(), "the front has nothing to say"
        for _ in range(3):
            await asyncio.sleep(0)


async def run(args: argparse.Namespace, options: list[str]) -> None:
    parsed = build_parser().parse_args(["serve", args.model, *options])
    found: list[Client] = []

    def connect(owner: LinkOwner) -> Any:
        found.append(Client(owner))
        return found[0]

    cases = [tuple(map(int, re.split(r"[x+]", case))) for case in args.cases.split(",")]
    values = config_values(parsed, EngineConfig) | {"max_num_seqs": max(one[0] for one in cases)}
    llm = AsyncLLM(
        EngineConfig(**values | {"model": args.model}), log_level="warning", connect=connect
    )
    await llm.start()
    front = Front(llm, found[0], args)
    settle_memory()
    for case in cases:
        await front.round(case)
        costs = [await front.round(case) for _ in range(args.rounds)]
        line = {
            "case": "{}x{}+{}".format(*case),
            "us_a_request": round(1e6 * min(one[0] for one in costs), 1),
            "us_a_token": round(1e6 * min(one[1] for one in costs), 2),
        }
        print(json.dumps(line), flush=True)
        if args.profile:
            profile = cProfile.Profile(time.process_time)
            await front.round(case, profile)
            pstats.Stats(profile).sort_stats(args.profile).print_stats(70)
    await llm.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--cases", default="64x512+128,256x512+128,1024x32+64")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--chat", action="store_true", help="messages in place of ids")
    parser.add_argument(
        "--cold", action="store_true", help="empty caches before each request, step"
    )
    parser.add_argument("--together", type=int, default=1, help="steps that come at once")
    parser.add_argument("--profile", help="also tell a request's functions, sorted by this")
    args, options = parser.parse_known_args()
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run(args, options))


if __name__ == "__main__":
    main()
