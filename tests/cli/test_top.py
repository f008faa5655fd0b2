"""`octavo top`: what it shows of what a server tells, and what it says when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.cli.commands import parse, run
from octavo.cli.top import bar, heat_map, size
from tests.server.conftest import StartServer, start_server  # noqa: F401

SEQUENCE = {
    "request_id": "1-7",
    "index": 1,
    "is_running": True,
    "prompt_len": 100,
    "num_computed": 110,
    "num_cached_tokens": 64,
    "num_outputs": 10,
    "max_outputs": 30,
    "age_seconds": 2.5,
}


def told(**stats: Any) -> dict[str, Any]:
    engine = {
        "num_steps": 10,
        "step_seconds": 1.0,
        "prefix_query_tokens": 100,
        "prefix_hit_tokens": 50,
        "num_generation_tokens": 1000,
        "num_prompt_tokens": 0,
        "num_running": 3,
        "num_waiting": 1,
        "waste_share": 0.015,
        "num_blocks": 100,
        "num_used_blocks": 25,
        "num_cached_blocks": 50,
        "tenants": [{"tenant": "abc", "num_running": 3, "num_waiting": 1, "kv_bytes": 2048}],
        "sequences": [SEQUENCE],
        "expert_counts": [],
    }
    plan = {"kv_bytes": 2**30, "weights_bytes": 2**29, "usable_bytes": 2**31}
    return {
        "time": 100.0,
        "version": "1",
        "model": "m",
        "uptime_seconds": 120,
        "plan": plan,
        "engine": {**engine, **stats},
    }


def shown(before: dict[str, Any], now: dict[str, Any]) -> str:
    from rich.console import Console

    from octavo.cli.top import screen

    console = Console(width=120)
    with console.capture() as capture:
        console.print(screen(before, now))
    return capture.get()


def test_rates_are_those_between_two_looks() -> None:
    now = told(
        num_generation_tokens=1500,
        num_steps=20,
        step_seconds=1.2,
        prefix_query_tokens=200,
        prefix_hit_tokens=130,
    )
    text = shown(told(), {**now, "time": 102.0})
    figures = text.splitlines()[2].split()
    assert figures == ["250", "0", "3", "1", "20.0", "ms", "80%", "1.5%"]
    assert "KV in use" in text
    assert "25% 256.0 MiB" in text
    assert "abc" in text
    assert "1-7/1" in text
    assert "decodes" in text
    assert "10/30" in text


def test_the_heat_of_experts_is_that_between_two_looks() -> None:
    assert heat_map([], []) == ""
    before = [[5, 5], [9, 0]]
    assert heat_map(before, [[5, 15], [14, 5]]) == " =\n::"
    assert heat_map(before, before) == "::\n= "  # nothing new: since the start
    large = heat_map([], [[1] * 200 for _ in range(60)])
    lines = large.splitlines()
    assert len(lines) <= 24
    assert {len(line) for line in lines} == {50}


def test_bars_and_sizes_stay_in_their_bounds() -> None:
    assert bar(-1) == "." * 24
    assert bar(2) == "#" * 24
    assert (size(5), size(2048), size(3 * 2**40)) == ("5 B", "2.0 KiB", "3.0 TiB")


def test_a_running_server_is_shown_once(
    start_server: StartServer,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = start_server(operator_key=("operator",)).url
    words = ["top", "--url", url, "--once", "--period", "0.2"]
    assert run(parse([*words, "--api-key", "operator"])) == 0
    assert "fake" in capsys.readouterr().out
    assert run(parse([*words, "--api-key", "wrong"])) == 2
    error = capsys.readouterr().err
    assert f"{url}/live answers 401: " in error
    assert "give an operator's key as --api-key" in error


def test_the_key_may_stand_in_the_environment_where_no_list_of_processes_shows_it(
    start_server: StartServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = start_server(operator_key=("operator",), api_key=("tenant",)).url
    words = ["top", "--url", url, "--once", "--period", "0.2"]
    monkeypatch.setenv("OCTAVO_API_KEY", "tenant")
    assert run(parse(words)) == 2
    monkeypatch.setenv("OCTAVO_OPERATOR_KEY", "operator")
    assert run(parse(words)) == 0
    assert run(parse([*words, "--api-key", "wrong"])) == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--url", "http://127.0.0.1:9"], "does not answer"),
        (["--url", "nonsense"], "give another --url"),
        (["--url", "http://a:b"], "cannot be used"),
        (["--period", "0"], "--period must be in 0.2..3600 seconds"),
        (["--period", "nan"], "--period must be in"),
    ],
)
def test_what_cannot_be_watched_is_said(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(parse(["top", *words])) == 2
    assert says in capsys.readouterr().err
