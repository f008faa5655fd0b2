"""Options made from dataclasses: kinds, choices, sizes and vLLM's spellings."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.cli.options import (
    Parser,
    add_options,
    config_values,
    engine_config,
    options_of,
    parse_size,
    server_config,
)
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import ConfigError


def engine(*argv: str) -> EngineConfig:
    parser = Parser()
    add_options(parser, EngineConfig)
    args = parser.parse_args(argv)
    args.model = "m"
    return engine_config(args)


def server(*argv: str) -> ServerConfig:
    parser = Parser()
    add_options(parser, ServerConfig)
    return server_config(parser.parse_args(argv))


def test_without_options_the_config_is_the_default():
    assert engine() == EngineConfig(model="m")


def test_every_field_but_the_model_is_an_option():
    names = {option.field for option in options_of(EngineConfig)}
    assert names == {field.name for field in fields(EngineConfig)} - {"model"}


def test_numbers_texts_and_choices_reach_their_fields():
    made = engine("--max-model-len", "99", "--dtype", "float32", "--gpu-memory-utilization", ".5")
    assert (made.max_model_len, made.dtype, made.gpu_memory_utilization) == (99, "float32", 0.5)


def test_booleans_have_a_positive_and_a_negative_form():
    assert engine("--enforce-eager").enforce_eager is True
    assert engine("--no-enforce-eager").enforce_eager is False


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--prefix-caching=auto", "auto"),
        ("--enable-prefix-caching", "on"),
        ("--no-enable-prefix-caching", "off"),
    ],
)
def test_prefix_caching_has_vllms_spelling_too(flag: str, value: str):
    assert engine(flag).prefix_caching == value


def test_the_cache_size_has_a_short_name_and_units():
    assert engine("--kv-cache-memory", "1.5GiB").kv_cache_memory_bytes == 3 * 2**29


def test_lists_are_given_at_once_or_one_by_one():
    assert server("--api-key", "a", "b", "--api-key", "c").api_key[:3] == ("a", "b", "c")
    assert server("--served-model-name", "org/m", "m").served_model_name == ("org/m", "m")


def test_a_list_may_be_json_as_vllm_spells_it():
    assert server("--allowed-origins", '["*"]').allowed_origins == ("*",)
    given = '["https://a.example", "http://b.example:8080"]'
    found = server("--allowed-origins", given).allowed_origins
    assert found == ("https://a.example", "http://b.example:8080")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--allowed-origins", "[*]"),
        ("--allowed-origins", "[1]"),
        ("--allowed-origins", "app.example.com"),
        ("--allowed-origins", "https://app.example.com/"),
        ("--allowed-origins", ""),
        ("--disable-access-log-for-endpoints", "health"),
        ("--served-model-name", " "),
    ],
)
def test_texts_that_could_never_match_are_refused(flag: str, value: str):
    with pytest.raises(ConfigError, match=flag[2:].replace("-", ".")):
        server(flag, value)


def test_endpoints_are_separated_by_commas():
    found = server("--disable-access-log-for-endpoints", "/health,/metrics, /ping")
    assert found.disable_access_log_for_endpoints == ("/health", "/metrics", "/ping")


@pytest.mark.parametrize(
    ("text", "length"), [("4k", 4000), ("4K", 4096), ("99", 99), ("25.6k", 25600), ("auto", None)]
)
def test_lengths_have_vllms_units(text: str, length: int | None):
    assert engine("--max-model-len", text).max_model_len == length


@pytest.mark.parametrize("text", ["", "4x", "-5", "k", "nan", "1e999"])
def test_what_is_no_length_is_refused(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        engine("--max-model-len", text)
    assert "is not a number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "dtype"), [("half", "float16"), ("float", "float32")])
def test_dtypes_have_vllms_words_too(word: str, dtype: str):
    assert engine("--dtype", word).dtype == dtype


def test_tensor_parallelism_has_vllms_short_name():
    assert engine("-tp", "2").tensor_parallel_size == 2


def test_a_test_mode_is_taken_but_not_shown():
    parser = Parser()
    add_options(parser, EngineConfig)
    assert "poison" not in parser.format_help()
    assert engine("--poison-freed-blocks").poison_freed_blocks


def test_a_numeric_choice_is_checked():
    with pytest.raises(ConfigError, match="--block-size 8 is unknown; use 16"):
        engine("--block-size", "8")


def test_options_that_were_not_given_are_left_to_the_dataclass():
    parser = Parser()
    add_options(parser, EngineConfig)
    assert config_values(parser.parse_args([]), EngineConfig) == {}


@given(st.integers(0, 2**50), st.sampled_from(["", "B"]))
def test_a_plain_number_is_bytes(number: int, unit: str):
    assert parse_size(f"{number}{unit}") == number


@pytest.mark.parametrize(
    ("text", "size"),
    [("1K", 1024), ("2MiB", 2**21), ("80GiB", 80 * 2**30), ("1tb", 2**40), ("0.5g", 2**29)],
)
def test_sizes_have_units(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1X", "1 2", "nan", "inf", "1e999"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)
