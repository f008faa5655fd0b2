"""Events of the KV cache over real sockets: what a router would believe equals what is cached."""

from __future__ import annotations

import json
import time
from array import array
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq

from octavo import LLM, ConfigError, EngineConfig, SamplingParams
from octavo.engine.kv_events import EventEncoder, EventPublisher
from octavo.kv_cache.news import CacheNews, Cleared, Event, Removed, Stored
from octavo.kv_cache.spec import group_layers
from octavo.kv_events_config import KVEventsConfig, of_rank, read_kv_events
from octavo.visibility import Full, Window
from tests.engine.event_sockets import TIMEOUT_MILLISECONDS, Sockets, replayed
from tests.models.tiny import TinyModel, save_tiny
from tests.scheduler.harness import BLOCK, Engine, spec_of

GROUPS = group_layers((spec_of(Full()), spec_of(Window(8))))
DIGESTS = [bytes([i]) * 32 for i in range(4)]
HASHES = [int.from_bytes(digest[-8:], "big") for digest in DIGESTS]
Message = tuple[bytes, int, list[Any]]


@pytest.fixture
def context() -> Iterator[Sockets]:
    sockets = Sockets()
    yield sockets
    sockets.close()


def subscriber(context: Sockets, endpoint: str | None, topic: bytes = b"") -> tuple[Any, str]:
    """Returns a subscriber that connects to `endpoint`, or binds one of its own."""
    socket = context.socket(zmq.SUB)
    socket.setsockopt(zmq.SUBSCRIBE, topic)
    socket.setsockopt(zmq.RCVTIMEO, TIMEOUT_MILLISECONDS)
    if endpoint is None:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        return socket, f"tcp://127.0.0.1:{port}"
    socket.connect(endpoint)
    return socket, endpoint


def read(socket: Any) -> Message:
    topic, number, payload = socket.recv_multipart()
    return topic, int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)


def publisher(encoding: str = "map", **options: Any) -> EventPublisher:
    config = KVEventsConfig(**{"endpoint": "tcp://127.0.0.1:*", "encoding": encoding, **options})
    return EventPublisher(config, EventEncoder(GROUPS, 2, encoding))


def joined(one: EventPublisher, socket: Any) -> list[Message]:
    """Publishes until the subscription has come through; returns what came, in order."""
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    for _ in range(400):
        one.publish([Cleared()])
        if poller.poll(50):
            return [read(socket)]
    raise AssertionError("nothing arrives")


EVENTS: list[Event] = [
    Stored(0, (DIGESTS[0], DIGESTS[1]), None, array("i", [5, 6, 7, 8]), "salt"),
    Stored(1, (DIGESTS[2],), DIGESTS[1], array("i", [9, 10]), ""),
    Removed(1, [DIGESTS[2]]),
    Cleared(),
]


def test_events_are_maps_as_vllm_has_them() -> None:
    seconds, events, rank = msgspec.msgpack.decode(
        EventEncoder(GROUPS, 2, "map").payload(12.5, EVENTS)
    )
    assert (seconds, rank) == (12.5, 0)
    first, second, removed, cleared = events
    assert first == {
        "type": "BlockStored",
        "block_hashes": HASHES[:2],
        "parent_block_hash": None,
        "token_ids": [5, 6, 7, 8],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [["salt"], None],
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
        "kv_cache_spec_sliding_window": None,
    }
    assert second["parent_block_hash"] == HASHES[1]
    assert (second["kv_cache_spec_kind"], second["kv_cache_spec_sliding_window"]) == (
        "sliding_window",
        8,
    )
    assert removed == {
        "type": "BlockRemoved",
        "block_hashes": HASHES[2:3],
        "medium": "GPU",
        "group_idx": 1,
    }
    assert cleared == {"type": "AllBlocksCleared"}


def test_events_are_arrays_where_asked() -> None:
    payload = EventEncoder(GROUPS, 2, "array").payload(1.0, EVENTS)
    first, _, removed, cleared = msgspec.msgpack.decode(payload)[1]
    assert first[:6] == ["BlockStored", HASHES[:2], None, [5, 6, 7, 8], 2, None]
    assert removed == ["BlockRemoved", HASHES[2:3], "GPU", 1]
    assert cleared == ["AllBlocksCleared"]


def test_a_subscriber_hears_of_its_topic_alone(context: Sockets) -> None:
    one = publisher(topic="kv@10.0.0.1:8000@model")
    try:
        socket, _ = subscriber(context, one.endpoint, b"kv@")
        (topic, number, payload) = joined(one, socket)[0]
        assert topic == b"kv@10.0.0.1:8000@model"
        one.publish(EVENTS)
        while payload[1] == [{"type": "AllBlocksCleared"}]:
            before = number
            topic, number, payload = read(socket)
            assert number == before + 1
        assert payload[1][0]["type"] == "BlockStored"
    finally:
        one.close()


def test_a_publisher_connects_where_an_endpoint_names_a_host(context: Sockets) -> None:
    socket, endpoint = subscriber(context, None)
    one = publisher(endpoint=endpoint)
    try:
        assert joined(one, socket)
    finally:
        one.close()


def test_who_missed_messages_gets_them_again(context: Sockets) -> None:
    one = publisher(replay_endpoint="tcp://127.0.0.1:*", buffer_steps=5)
    try:
        for place in range(8):
            one.publish([Removed(0, [DIGESTS[place % 4]])])
        assert one.replay_endpoint is not None
        deadline = time.monotonic() + 20
        while [number for number, _ in replayed(context, one.replay_endpoint, 0)] != [*range(3, 8)]:
            assert time.monotonic() < deadline
        again = replayed(context, one.replay_endpoint, 6)
        assert [number for number, _ in again] == [6, 7]
        assert again[0][1][1][0]["block_hashes"] == [HASHES[2]]
    finally:
        one.close()


def test_what_finds_no_room_is_counted_and_leaves_a_gap(context: Sockets) -> None:
    one = publisher(max_queue_size=1, replay_endpoint="tcp://127.0.0.1:*")
    try:
        for _ in range(2000):  # faster than a thread encodes
            one.publish(EVENTS)
        assert 0 < one.num_dropped < 2000
        assert one.replay_endpoint is not None
        deadline = time.monotonic() + 20
        while len(found := replayed(context, one.replay_endpoint, 0)) < 2000 - one.num_dropped:
            assert time.monotonic() < deadline
        numbers = [number for number, _ in found]
        assert numbers == sorted(numbers)
        assert len(numbers) == 2000 - one.num_dropped
    finally:
        one.close()


def believed(events: list[Event]) -> dict[int, set[bytes]]:
    """Returns what is cached in each group, as far as events tell."""
    found: dict[int, set[bytes]] = {0: set(), 1: set()}
    for event in events:
        if isinstance(event, Stored):
            assert not found[event.group] & set(event.digests)
            assert len(event.token_ids) == BLOCK * len(event.digests)
            found[event.group] |= set(event.digests)
        elif isinstance(event, Removed):
            assert set(event.digests) <= found[event.group]
            found[event.group] -= set(event.digests)
        else:
            found = {0: set(), 1: set()}
    return found


def test_events_tell_exactly_what_can_be_found_over_evictions_and_resets() -> None:
    specs = (spec_of(Full()), spec_of(Window(8)))
    news = CacheNews((0, 1), BLOCK)
    engine = Engine(specs=specs, num_blocks=48, budget=24, max_num_seqs=4, news=news)
    events: list[Event] = []
    for round_ in range(12):
        for i in range(3):
            start = (round_ * 7 + i) % 5 * 100
            engine.add(f"{round_}-{i}", [*range(start, start + 20 + 3 * i)], 6)
        engine.run()
        events += news.take()
        found = {
            group: {k.digest for k, _ in engine.manager.index.items() if k.group == group}
            for group in (0, 1)
        }
        assert believed(events) == found
    assert any(isinstance(event, Removed) for event in events)
    assert engine.manager.reset_prefix_cache()
    events += news.take()
    assert believed(events) == {0: set(), 1: set()}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("mixtral", tmp_path_factory.mktemp("models"))


def test_an_engine_publishes_what_a_prompt_leaves(mixtral: TinyModel, context: Sockets) -> None:
    config = {
        "endpoint": "tcp://127.0.0.1:*",
        "replay_endpoint": "tcp://127.0.0.1:*",
        "topic": "kv@here@tiny",
    }
    llm = LLM(
        str(mixtral.folder),
        device="cpu",
        dtype="float32",
        skip_tokenizer_init=True,
        num_threads=1,
        kv_cache_memory_bytes=4 * 2**20,
        kv_events_config=config,
    )
    try:
        prompt = [i % 90 for i in range(40)]
        llm.generate(prompt, SamplingParams(max_tokens=2, temperature=0.0), use_tqdm=False)
        assert llm.reset_prefix_cache()
        events = llm.core._events
        assert events is not None
        assert events.replay_endpoint is not None
        told: list[dict[str, Any]] = []
        deadline = time.monotonic() + 20
        while not told or told[-1]["type"] != "AllBlocksCleared":
            assert time.monotonic() < deadline
            messages = replayed(context, events.replay_endpoint, 0)
            told = [event for _, (_, found, _) in messages for event in found]
        stored = [event for event in told if event["type"] == "BlockStored"]
        assert [ids for event in stored for ids in event["token_ids"]] == prompt[:32]
        assert stored[0]["parent_block_hash"] is None
        assert llm.stats().num_dropped_events == 0
    finally:
        llm.close()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "must be a JSON object"),
        ("{", "must be a JSON object"),
        ('{"endpont": "tcp://*:1"}', "endpont is unknown; known are enable_kv_cache_events"),
        ('{"endpoint": 5}', "endpoint must be str, got 5"),
        ('{"endpoint": "localhost:5557"}', "endpoint must begin with tcp://"),
        ('{"publisher": "kafka"}', "publisher must be one of zmq, null"),
        ('{"encoding": "xml"}', "encoding must be one of map, array"),
        ('{"hwm": 0}', "hwm must be in 1..10000000"),
        ('{"hwm": true}', "hwm must be int, got True"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match="kv_events_config") as caught:
        read_kv_events(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "of_third"),
    [
        ("tcp://*:5557", "tcp://*:5559"),
        ("tcp://[::]:5557", "tcp://[::]:5559"),
        ("tcp://picker.local:7000", "tcp://picker.local:7002"),
        ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        ("ipc:///run/events", "ipc:///run/events_dp2"),
        ("inproc://events", "inproc://events_dp2"),
    ],
)
def test_each_engine_of_a_fleet_has_a_place_of_its_own(endpoint: str, of_third: str) -> None:
    text = json.dumps({"endpoint": endpoint, "replay_endpoint": endpoint})
    first, third = (read_kv_events(of_rank(text, rank)) for rank in (0, 2))
    assert (first.own_endpoint, first.own_replay_endpoint) == (endpoint, endpoint)
    assert (third.own_endpoint, third.own_replay_endpoint) == (of_third, of_third)
    assert read_kv_events(of_rank("{}", 2)).own_replay_endpoint is None
    _, _, rank = msgspec.msgpack.decode(EventEncoder(GROUPS, 2, "map", 2).payload(1.0, []))
    assert rank == 2


@pytest.mark.parametrize(
    ("endpoint", "replay", "says"),
    [
        ("tcp://*:5557", "tcp://*:5559", "take one that is 3 or more away"),
        ("tcp://*:5559", "tcp://*:5557", "take one that is 3 or more away"),
        ("tcp://*:65534", "tcp://*:5557", "begin at 65533 or below"),
    ],
)
def test_engines_whose_ports_would_meet_are_refused(endpoint: str, replay: str, says: str) -> None:
    text = json.dumps({"endpoint": endpoint, "replay_endpoint": replay})
    EngineConfig(model="m", kv_events_config=text).resolve()
    with pytest.raises(ConfigError, match=says):
        EngineConfig(model="m", kv_events_config=text, data_parallel_size=3).resolve()
    apart = json.dumps({"endpoint": "tcp://*:5557", "replay_endpoint": "tcp://*:5560"})
    EngineConfig(model="m", kv_events_config=apart, data_parallel_size=3).resolve()


def test_an_endpoint_that_is_taken_is_named(context: Sockets) -> None:
    taken = context.socket(zmq.PUB)
    port = taken.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ConfigError, match=f"endpoint 'tcp://\\*:{port}' cannot be used"):
        publisher(endpoint=f"tcp://*:{port}")


def test_nobody_publishes_where_vllms_config_says_so() -> None:
    assert not read_kv_events(json.dumps({"enable_kv_cache_events": False})).is_on
    assert not read_kv_events('{"publisher": "null"}').is_on
    assert read_kv_events("{}").is_on
