"""Which guards a server starts with, and none."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError, RequestError
from octavo.guard import GuardCheck
from octavo.server.generation import _Progress
from octavo.server.guards.load import new_gate
from octavo.server.serve import bind
from tests.server.guards import judges
from tests.server.guards.calls import MODULE, complete


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"guard": "no.such.module:f"}, "cannot be imported"),
        ({"guard": f"{MODULE}:nothing"}, "cannot be imported"),
        ({"guard": f"{MODULE}:NOT_A_FUNCTION"}, "must be a function"),
        ({"guard": "no colon"}, "must be like"),
        ({"guard_url": "localhost:9000"}, "must be like"),
        ({"guard": "a:b", "guard_url": "http://x/"}, "both given"),
        ({"guard_timeout": 0.0}, "above 0"),
        ({"guard_window": -1}, "at least 0"),
        ({"guard_max_concurrent": 0}, "at least 1"),
    ],
)
def test_a_guard_that_cannot_be_had_ends_the_start(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        bind(ServerConfig(port=0, **options).resolve())


def test_a_server_without_texts_has_no_guard() -> None:
    class WithoutTokenizer:
        @property
        def tokenizer(self) -> Any:
            raise RequestError("there is no tokenizer")

    engine: Any = WithoutTokenizer()
    assert new_gate(ServerConfig(), engine) is None
    with pytest.raises(ConfigError, match="no tokenizer"):
        new_gate(ServerConfig(guard=f"{MODULE}:strict"), engine)


def test_without_a_guard_no_receiver_stands_between(start_server: Any) -> None:
    kinds: list[type] = []
    server = start_server()
    submit = server.engine.submit
    server.engine.submit = lambda request, receiver, marks=None: (
        kinds.append(type(receiver)),
        submit(request, receiver, marks),
    )
    complete(server)
    assert kinds == [_Progress]
    assert "octavo:guard" not in httpx.get(f"{server.url}/metrics").text


def test_judges_are_what_the_docs_say_a_guard_is() -> None:
    check = GuardCheck(
        stage="input", texts=(), request_id="", route="", model="", tenant="", key=""
    )
    assert judges.watcher(check) is None
