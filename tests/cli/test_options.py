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


def test_repeated_options_make_a_tuple():
    assert server("--api-key", "a", "--api-key", "b").api_key[:2] == ("a", "b")


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
    with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
        parse_size(text)
