"""`octavo chat` against a server."""

from __future__ import annotations

import io

import pytest

from octavo.cli import main

from .conftest import FakeServer


def chat(
    fake: FakeServer, lines: str, monkeypatch: pytest.MonkeyPatch, *more: str, code: int = 0
) -> list[dict[str, object]]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert main(["chat", "--url", fake.url, *more]) == code
    return fake.bodies


def test_answers_are_streamed_to_stdout(
    fake_server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    chat(fake_server, "Hi\n/exit\nnever read\n", monkeypatch, "--max-tokens", "2")
    assert capsys.readouterr().out == "w0 w1 \n"
    assert len(fake_server.bodies) == 1


def test_the_history_is_sent_with_every_message(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    bodies = chat(fake_server, "one\ntwo\n", monkeypatch, "--max-tokens", "1")
    assert bodies[1]["messages"] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "w0 "},
        {"role": "user", "content": "two"},
    ]


def test_reset_forgets_and_system_is_put_first(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    bodies = chat(fake_server, "one\n/reset\n/system Be brief.\ntwo\n", monkeypatch)
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two"},
    ]


def test_sampling_options_are_sent_and_others_left_to_the_server(
    fake_server: FakeServer, monkeypatch: pytest.MonkeyPatch
):
    (body,) = chat(fake_server, "Hi\n", monkeypatch, "--temperature", "0", "--top-p", "0.5")
    assert (body["temperature"], body["top_p"], body["model"]) == (0.0, 0.5, "fake-model")
    assert "max_tokens" not in body


def test_a_refused_message_is_shown_and_forgotten(
    fake_server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    fake_server.refuse = "too long"
    bodies = chat(fake_server, "one\ntwo\n", monkeypatch, code=1)
    assert "error: HTTP 400: too long" in capsys.readouterr().err
    assert bodies[1]["messages"] == [{"role": "user", "content": "two"}]


def test_a_wrong_key_is_said_before_the_chat_begins(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
):
    fake_server.key = "secret"
    assert main(["chat", "--url", fake_server.url, "--api-key", "other"]) == 2
    assert "give it with --api-key KEY" in capsys.readouterr().err


def test_no_server_is_an_error_with_a_way_out(capsys: pytest.CaptureFixture[str]):
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 2
    assert "start one with octavo serve" in capsys.readouterr().err


def test_a_model_of_its_own_is_served_for_the_chat_alone(
    tiny_chat_model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    argv = ["chat", tiny_chat_model, "--load-format=dummy", "--device=cpu", "--num-threads=1"]
    assert main([*argv, "--kv-cache-memory=16MiB", "--max-tokens=5"]) == 0
    shown = capsys.readouterr()
    assert "loading" in shown.err
    assert "error" not in shown.err
    assert len(shown.out) > 1


def test_a_model_that_cannot_be_loaded_ends_the_chat(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["chat", tiny_model, "--device=cpu", "--skip-tokenizer-init"]) == 2
    assert "--load-format dummy" in capsys.readouterr().err
