"""Stored responses through restarts, full stores, and several front processes."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from octavo.config import ServerConfig
from octavo.server import stored_responses
from tests.no_folder import NOWHERE
from tests.server.conftest import ServerThread
from tests.server.fronts import Fronts
from tests.server.noting_engine import NotingEngine
from tests.server.stored_calls import KEYS, PATH, UNKNOWN, ask, client_of
from tests.server.tiny_engine import write_model


def test_a_restart_keeps_responses_and_knows_what_did_not_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_responses, "ALIVE_SECONDS", 0)
    config = ServerConfig(port=0, store_dir=str(tmp_path), shutdown_timeout=1.0)
    server = ServerThread(NotingEngine(), config)
    with client_of(server) as client:
        made = ask(client)
        server.engine.is_endless, server.engine.answer = True, None
        running = ask(client, background=True)
    # As if it had been killed: what runs is never told to have ended.
    server.server._state.responses.replace = _nothing  # type: ignore[method-assign]
    server.end()
    again = ServerThread(NotingEngine(), config)
    try:
        with client_of(again) as client:
            assert client.responses.retrieve(made.id) == made
            broken = client.responses.retrieve(running.id)
            assert broken.status == "failed"
            assert broken.error is not None
            assert ask(client, previous_response_id=made.id).status == "completed"
    finally:
        again.end()


async def _nothing(*given: object) -> None:
    pass


def test_the_end_of_a_server_ends_what_is_in_the_background(tmp_path: Path) -> None:
    config = ServerConfig(port=0, store_dir=str(tmp_path), shutdown_timeout=1.0)
    server = ServerThread(NotingEngine(), config)
    server.engine.is_endless, server.engine.answer = True, None
    with client_of(server) as client:
        running = ask(client, background=True)
    server.end()
    again = ServerThread(NotingEngine(), config)
    try:
        with client_of(again) as client:
            assert client.responses.retrieve(running.id).status in ("failed", "cancelled")
    finally:
        again.end()


def test_a_store_that_cannot_be_written_harms_nobody_who_does_not_need_it(tmp_path: Path) -> None:
    config = ServerConfig(port=0, store_dir=NOWHERE, shutdown_timeout=1.0)
    server = ServerThread(NotingEngine(), config)
    try:
        with client_of(server) as client:
            for more in ({}, {"store": False}):
                answer = ask(client, **more)
                assert (answer.output_text, answer.store) == ("Hello.", False)
            for more in ({"store": True}, {"background": True}, {"previous_response_id": UNKNOWN}):
                with pytest.raises(openai.InternalServerError, match="--store-dir") as refused:
                    ask(client, **more)
                assert refused.value.code == "store_unavailable"
            assert ask(client, stream=True)
    finally:
        server.end()


def test_a_full_store_lets_the_oldest_go_but_not_what_is_used(tmp_path: Path) -> None:
    config = ServerConfig(
        port=0, store_dir=str(tmp_path), max_store_bytes=64 * 1024, shutdown_timeout=1.0
    )
    server = ServerThread(NotingEngine(), config)
    try:
        with client_of(server) as client:
            used, unused = ask(client), ask(client)
            for _ in range(8):  # of 16 KiB
                ask(client, "x" * 2000)
                used = ask(client, previous_response_id=used.id)
            assert client.responses.retrieve(used.id) == used
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(unused.id)
            # What does not fit at all is told, and not stored.
            assert not ask(client, [{"role": "user", "content": "y"}] * 1000).store
            with pytest.raises(openai.APIStatusError) as refused:
                ask(client, [{"role": "user", "content": "y"}] * 1000, store=True)
            assert (refused.value.status_code, refused.value.code) == (507, "store_full")
    finally:
        server.end()


def test_front_processes_share_responses_and_their_ends(tmp_path: Path) -> None:
    """Over one engine, with two keys; every request has a connection, and so a front, of its
    own."""
    (tmp_path / "model").mkdir()
    options = ("--api-processes=2", f"--store-dir={tmp_path / 'store'}", "--api-key=key-a")
    options += ("--api-key=key-b", "--shutdown-timeout=2")
    fronts = Fronts(write_model(tmp_path / "model"), tmp_path / "log", *options)
    try:
        mine, theirs = ({"Authorization": f"Bearer {key}"} for key in KEYS)
        url = f"{fronts.url}{PATH}"
        first = {"input": "Hi", "max_output_tokens": 4}
        made = httpx.post(url, json=first, headers=mine, timeout=60).json()
        body = {**first, "previous_response_id": made["id"]}
        for headers, status in ((mine, 200), (mine, 200), (theirs, 404), (theirs, 404)):
            found = httpx.get(f"{url}/{made['id']}", headers=headers, timeout=60)
            again = httpx.post(url, json=body, headers=headers, timeout=60)
            assert [found.status_code, again.status_code] == [status] * 2
        long = {"input": "Hi", "background": True, "ignore_eos": True}
        ends: list[str] = []
        while "cancelled" not in ends:
            # Connections are dealt out in turn: who cancels speaks to the other front.
            made = httpx.post(url, json=long, headers=mine, timeout=60).json()
            httpx.post(f"{url}/{made['id']}/cancel", headers=mine, timeout=60)
            told = httpx.get(f"{url}/{made['id']}", headers=mine, timeout=60).json()
            ends.append(told["status"])
            assert len(ends) < 8, "all had ended before they were cancelled"
    finally:
        fronts.process.terminate()
        assert fronts.process.wait(timeout=60) == 0
