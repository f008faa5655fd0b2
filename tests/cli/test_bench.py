"""The benchmarks: workloads, figures and reports, on loads small enough for a test."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.cli import main
from octavo.cli.bench.prefix import measure_lookup, measure_scheduler, measure_waste
from octavo.cli.bench.report import percentiles
from octavo.cli.bench.serve import Served, figures_of
from octavo.cli.bench.workload import (
    Lengths,
    PromptSource,
    parse_goodput,
    parse_lengths,
    read_text_ids,
)
from octavo.errors import ConfigError

from .conftest import FakeServer


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- workload ------------------------------------------------------------------------------------


def test_lengths_are_one_number_or_a_range():
    assert parse_lengths("128") == Lengths(low=128, high=128)
    assert parse_lengths("100:1000") == Lengths(low=100, high=1000)


@pytest.mark.parametrize("text", ["", "0", "5:4", "a", "1:2:3", "-3"])
def test_what_is_no_length_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError, match="is no length"):
        parse_lengths(text)


@given(st.integers(1, 50), st.integers(0, 50), st.integers(0, 1000))
def test_prompts_are_repeatable_and_of_the_wanted_lengths(low: int, more: int, seed: int):
    lengths = Lengths(low=low, high=low + more)
    source = PromptSource(vocab_size=100, seed=seed)
    prompts = source.draw(5, lengths)
    assert prompts == PromptSource(vocab_size=100, seed=seed).draw(5, lengths)
    assert all(low <= len(prompt) <= low + more for prompt in prompts)
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)


def test_rounds_have_different_prompts():
    source = PromptSource(vocab_size=1000, seed=1)
    lengths = Lengths(low=16, high=16)
    assert source.draw(1, lengths, 0)[0][:4] != source.draw(1, lengths, 1)[0][:4]


def test_text_prompts_are_pieces_of_the_text(tmp_path: Path):
    (tmp_path / "text").write_text("abcdefgh")
    ids = read_text_ids(str(tmp_path / "text"), lambda text: [ord(c) for c in text])
    source = PromptSource(vocab_size=9, seed=0, text_ids=ids)
    (prompt,) = source.draw(1, Lengths(low=3, high=3))
    assert "".join(map(chr, prompt)) in "abcdefgh"
    with pytest.raises(ConfigError, match="--text has 8 tokens, a prompt needs 9"):
        source.draw(1, Lengths(low=9, high=9))


def test_goals_are_milliseconds():
    assert parse_goodput("ttft:500") == ("ttft", 0.5)
    for text in ("ttft", "speed:5", "tpot:-1", "tpot:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no goal"):
            parse_goodput(text)


# -- figures -------------------------------------------------------------------------------------


def test_percentiles_are_values_that_occurred():
    figures = percentiles("x", [0.004, 0.001, 0.003, 0.002], (50, 99))
    assert figures == {"x_mean_ms": 2.5, "x_p50_ms": 2.0, "x_p99_ms": 4.0}
    assert percentiles("x", [], (50,)) == {}


def test_goodput_counts_the_requests_within_all_goals():
    fast = Served(started=0.0, token_times=[0.1, 0.2], finished=0.2, num_output_tokens=2)
    slow = Served(started=0.0, token_times=[0.9, 1.0], finished=1.0, num_output_tokens=2)
    figures = figures_of([fast, slow], 4, 2.0, [("ttft", 0.5), ("e2e", 0.5)])
    assert figures["goodput_share"] == 0.25
    assert figures["num_failed"] == 2
    assert figures["output_tokens_per_second"] == 2.0
    assert figures["tpot_p50_ms"] == pytest.approx(100.0)


# -- against a server ----------------------------------------------------------------------------


def test_serve_measures_every_request_and_writes_one_line(fake_server: FakeServer, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    options = ["--num-prompts", "5", "--input-len", "4:9", "--output-len", "3"]
    argv = ["bench", "serve", "--url", fake_server.url, "--output", str(output), *options]
    assert main([*argv, "--max-concurrency", "2", "--goodput", "ttft:60000"]) == 0
    (line,) = lines_of(output)
    figures = line["figures"]
    assert figures["num_succeeded"] == 5
    assert figures["output_tokens"] == 15
    assert figures["prompt_tokens"] == sum(len(body["prompt"]) for body in fake_server.bodies)
    assert figures["cached_prompt_tokens"] == 5
    assert figures["goodput_share"] == 1.0
    assert line["versions"]["octavo"]
    assert line["device"]["cores"] >= 1
    assert line["settings"]["input_len"] == "4:9"


def test_serve_sends_equal_load_for_equal_seeds(fake_server: FakeServer, tmp_path: Path):
    argv = ["bench", "serve", "--url", fake_server.url, "--num-prompts", "2"]
    for _ in range(2):
        assert main([*argv, "--input-len", "8", "--output", str(tmp_path / "o")]) == 0
    first, second = fake_server.bodies[:2], fake_server.bodies[2:]
    assert sorted(b["prompt"] for b in first) == sorted(b["prompt"] for b in second)
    assert all(body["ignore_eos"] for body in first)


def test_serve_keys_are_not_written_down(fake_server: FakeServer, tmp_path: Path):
    fake_server.key = "very-secret"
    output = tmp_path / "out.jsonl"
    argv = ["bench", "serve", "--url", fake_server.url, "--api-key", "very-secret"]
    assert main([*argv, "--num-prompts", "1", "--output", str(output)]) == 0
    assert "very-secret" not in output.read_text()


def test_serve_fails_when_all_requests_fail(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
):
    fake_server.refuse = "no room"
    assert main(["bench", "serve", "--url", fake_server.url, "--num-prompts", "2"]) == 2
    assert "all 2 requests failed" in capsys.readouterr().err


def test_serve_says_when_nobody_answers(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no server answers" in capsys.readouterr().err


# -- bookkeeping without a model -----------------------------------------------------------------


def test_lookup_finds_every_block():
    assert measure_lookup(1024, 1)["prompt_tokens"] == 1024


def test_the_scheduler_is_measured_with_all_sequences_running():
    assert measure_scheduler(8, seed=0)["running_sequences"] == 8


def test_waste_is_a_small_share():
    figures = measure_waste(16, seed=0)
    assert 0 < figures["waste_share_mean"] < 0.04  # type: ignore[operator]


# -- with a model --------------------------------------------------------------------------------


@pytest.fixture
def tiny_options(tiny_model: str, tmp_path: Path) -> list[str]:
    return [
        tiny_model,
        "--load-format=dummy",
        "--skip-tokenizer-init",
        "--num-threads=1",
        "--kv-cache-memory=16MiB",
        f"--output={tmp_path / 'out.jsonl'}",
    ]


def test_latency_counts_what_was_asked_for(tiny_options: list[str], tmp_path: Path):
    sizes = ["--batch-size", "2", "--input-len", "20", "--output-len", "5", "--repeat", "1"]
    assert main(["bench", "latency", *tiny_options, *sizes]) == 0
    (line,) = lines_of(tmp_path / "out.jsonl")
    figures = line["figures"]
    made = figures["output_tokens_per_second"] * figures["seconds"]
    assert made == pytest.approx(2 * 5, rel=1e-3)
    assert figures["ttft_p50_ms"] > 0
    assert figures["peak_rss_bytes"] > 2**20


def test_throughput_runs_mixed_lengths(tiny_options: list[str], tmp_path: Path):
    sizes = ["--num-prompts", "6", "--input-len", "5:40", "--output-len", "1:8"]
    assert main(["bench", "throughput", *tiny_options, *sizes]) == 0
    (line,) = lines_of(tmp_path / "out.jsonl")
    assert line["name"] == "6 requests"


def test_prefix_computes_a_shared_prefix_once(tiny_options: list[str], tmp_path: Path):
    sizes = ["--prefix-len", "64", "--requests", "4", "--repeat", "1"]
    bookkeeping = ["--lookup-len", "256", "--sequences", "4"]
    assert main(["bench", "prefix", *tiny_options, *sizes, *bookkeeping]) == 0
    lines = {line["name"]: line["figures"] for line in lines_of(tmp_path / "out.jsonl")}
    assert list(lines) == ["hit against cold", "shared at once", "lookup", "scheduler", "waste"]
    shared = lines["shared at once"]
    assert shared["prompt_tokens"] == 4 * (64 + 16)
    assert shared["prompt_tokens_computed"] <= 64 + 4 * 32
