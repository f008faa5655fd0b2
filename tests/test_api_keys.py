"""Where keys come from, and which are refused at start: never the key itself in a message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OCTAVO_API_KEY", "OCTAVO_OPERATOR_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["api_key", "operator_key"])
def test_keys_come_from_options_a_file_and_the_environment(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"one\r\n\n  two  \ncl\xc3\xa9\none\n")
    monkeypatch.setenv(f"OCTAVO_{name.upper()}", "three")
    config = ServerConfig(**{name: ("zero", "one"), f"{name}_file": str(file)}).resolve()
    assert getattr(config, name) == ("zero", "one", "two", "cl\u00e9", "three")
    assert config.resolve() == config


@pytest.mark.parametrize("name", ["api_key", "operator_key"])
@pytest.mark.parametrize("key", ["", " ", " secret", "secret\t", "sec\nret", "sec\x00ret"])
def test_a_key_that_nobody_could_send_is_refused(name: str, key: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(**{name: ("good", key)}).resolve()
    assert refused.value.field == name
    assert "secret" not in str(refused.value)


def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_API_KEY", "")
    assert ServerConfig().resolve().api_key == ()
    monkeypatch.setenv("OCTAVO_API_KEY", "  ")
    with pytest.raises(ConfigError):
        ServerConfig().resolve()


@pytest.mark.parametrize("content", ["", "\n \n", None])
def test_a_file_without_keys_does_not_open_the_server(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError) as refused:
        ServerConfig(api_key_file=str(file)).resolve()
    assert refused.value.field == "api_key_file"
    assert str(file) in str(refused.value)


def test_a_key_has_one_role() -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(api_key=("secret",), operator_key=("secret",)).resolve()
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("0..0", (0, 0)), ("-10..10", (-10, 10)), ("0..5", (0, 5)), ("all", (1 - 2**31, 2**31 - 1))],
)
def test_priorities_are_a_range(given: str, wanted: tuple[int, int]) -> None:
    assert ServerConfig(allow_priority=given).resolve().priority_range == wanted


@pytest.mark.parametrize("given", ["", "5", "1..5", "-5..-1", "5..-5", "a..b", "0..9999999999"])
def test_a_range_of_priorities_that_makes_no_sense_is_refused(given: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerConfig(allow_priority=given).resolve()
    assert refused.value.field == "allow_priority"


def test_a_key_of_broken_unicode_is_refused_or_kept_as_its_bytes() -> None:
    # What the shell hands over as bytes that are no UTF-8 comes as lone surrogates.
    key = os.fsdecode(b"cl\xe9")
    with pytest.raises(ConfigError):
        ServerConfig(api_key=(key,)).resolve()


def test_no_text_of_the_options_shows_a_key() -> None:
    config = ServerConfig(api_key=("secret",), operator_key=("secrets",)).resolve()
    assert "secret" not in f"{config} {config!r}"
