"""The benchmarks: workloads, figures and reports, on loads small enough for a test."""

from __future__ import annotations

import argparse
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.cli import main
from octavo.cli.bench.client import Served
from octavo.cli.bench.prefix import measure_lookup, measure_scheduler, measure_waste
from octavo.cli.bench.report import Report, percentiles
from octavo.cli.bench.serve import figures_of, loads_of
from octavo.cli.bench.workload import (
    Lengths,
    PromptSource,
    parse_goodput,
    parse_lengths,
    read_text_ids,
)
from octavo.cli.commands import build_parser
from octavo.errors import ConfigError
from tests.cli.bench_lines import lines_of

from .conftest import FakeServer

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
    fast = Served(
        started=0.0, token_times=array("d", [0.1, 0.2]), finished=0.2, num_output_tokens=2
    )
    slow = Served(
        started=0.0, token_times=array("d", [0.9, 1.0]), finished=1.0, num_output_tokens=2
    )
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


def bodies_of_two_runs(fake: FakeServer, options: list[str]) -> list[list[dict[str, Any]]]:
    runs = []
    for _ in range(2):
        fake.bodies.clear()
        assert main(["bench", "serve", "--url", fake.url, "--num-prompts", "3", *options]) == 0
        runs.append(list(fake.bodies))
    return runs


def prompts_of(run: list[dict[str, Any]]) -> list[list[int]]:
    return sorted(body["prompt"] for body in run)


def test_serve_sends_new_prompts_of_equal_lengths_in_every_run(fake_server: FakeServer):
    sizes = ["--input-len", "8:90", "--output-len", "2:9"]
    first, second = bodies_of_two_runs(fake_server, sizes)
    assert all(one not in prompts_of(second) for one in prompts_of(first))
    for length in (lambda body: len(body["prompt"]), lambda body: body["max_tokens"]):
        assert sorted(map(length, first)) == sorted(map(length, second))
    assert all(body["ignore_eos"] for body in first)


def test_serve_sends_the_same_prompts_for_a_seed(fake_server: FakeServer):
    first, second = bodies_of_two_runs(fake_server, ["--workload-seed", "7", "--input-len", "8"])
    assert prompts_of(first) == prompts_of(second)


def test_serve_says_when_prompts_were_cached(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
):
    argv = ["bench", "serve", "--url", fake_server.url, "--num-prompts", "2"]
    assert main([*argv, "--input-len", "3"]) == 0
    assert "2 of 6 prompt tokens in its prefix cache" in capsys.readouterr().err
    assert main([*argv, "--input-len", "30"]) == 0
    assert "prefix cache" not in capsys.readouterr().err


def test_serve_sends_a_stream_its_next_prompt_when_its_answer_ended(
    fake_server: FakeServer, tmp_path: Path
):
    output = tmp_path / "out.jsonl"
    argv = ["bench", "serve", "--url", fake_server.url + "/v1/", "--output", str(output)]
    assert main([*argv, "--concurrency", "2", "--waves", "3", "--output-len", "5"]) == 0
    (line,) = lines_of(output)
    figures = line["figures"]
    assert figures["num_succeeded"] == len(fake_server.bodies) == 6
    assert set(fake_server.paths) == {"/v1/models", "/v1/completions"}
    assert fake_server.most_open <= 2
    assert figures["output_events"] == 6 * 5
    assert figures["ttft_after_first_wave_p99_over_p50"] >= 1
    assert figures["itl_p99_ms"] >= figures["itl_p50_ms"]
    assert figures["client_cpu_share"] > 0


def test_serve_merges_what_several_client_processes_saw(fake_server: FakeServer, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    argv = ["bench", "serve", "--url", fake_server.url, "--model", "m", "--output", str(output)]
    assert main([*argv, "--clients", "2", "--concurrency", "3", "--waves", "2"]) == 0
    (line,) = lines_of(output)
    assert line["figures"]["num_succeeded"] == 6
    assert line["figures"]["output_tokens"] == 6 * 128
    assert {body["model"] for body in fake_server.bodies} == {"m"}
    assert len({tuple(body["prompt"]) for body in fake_server.bodies}) == 6


def test_every_client_process_has_whole_waves(fake_server: FakeServer):
    argv = ["bench", "serve", "--url", fake_server.url, "--clients=3", "--concurrency=64"]
    loads = loads_of(build_parser().parse_args([*argv, "--waves", "2"]), seed=0)
    assert [load.num_streams for load in loads] == [22, 21, 21]
    assert [len(load.shots) for load in loads] == [44, 42, 42]


def test_serve_refuses_more_clients_than_streams(
    fake_server: FakeServer, capsys: pytest.CaptureFixture[str]
):
    argv = ["bench", "serve", "--url", fake_server.url, "--clients", "3", "--concurrency", "2"]
    assert main(argv) == 2
    assert "use at most 2" in capsys.readouterr().err


def test_serve_counts_requests_whose_connection_is_lost(
    fake_server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake_server.cut_after = 2
    assert main(["bench", "serve", "--url", fake_server.url, "--num-prompts", "2"]) == 2
    assert "the connection was lost" in capsys.readouterr().err


def test_json_goes_to_a_pipe_and_a_terminal_sees_the_table_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    report = Report(bench="b", settings={})
    report.add("one", {"x": 1})
    assert json.loads(capsys.readouterr().out)["figures"] == {"x": 1}
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    report.add("one", {"x": 1})
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "b: one" in shown.err


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
    bookkeeping = ["--lookup-len", "256", "--long-len", "256", "--sequences", "4"]
    assert main(["bench", "prefix", *tiny_options, *sizes, *bookkeeping]) == 0
    lines = {line["name"]: line["figures"] for line in lines_of(tmp_path / "out.jsonl")}
    assert list(lines) == [
        "hit against cold",
        "shared at once",
        "lookup",
        "long context",
        "scheduler",
        "waste",
    ]
    shared = lines["shared at once"]
    assert shared["prompt_tokens"] == 4 * (64 + 16)
    assert shared["prompt_tokens_computed"] <= 64 + 4 * 32
