"""`octavo plan --price`: dollars from floors and from the lines of `octavo bench`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from octavo.cli.bench.floors import CEILINGS
from octavo.cli.bench.report import device
from tests.weights.tiny_gguf import write_quantised_gguf

CARD = "NVIDIA H100 80GB HBM3"
ON_CARD = ["--device", "cuda", "--memory", "24GiB"]
SHORT = ["--workloads", "100:20,300:200:50"]


@pytest.fixture(autouse=True)
def no_kept_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("OCTAVO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bench"


def costs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *argv, "--price", "3.6", *SHORT, "--json"]) == 0
    return json.loads(capsys.readouterr().out)["costs"]


def line(model: str, name: str, computes_on: str = CARD, **settings: Any) -> dict[str, Any]:
    """As `octavo bench workloads` writes one: D1, or P of 256 tokens."""
    figures = {
        "D1": {"unit": "ms", "median": 2.0, "batch": 1, "share_of_floor": 0.5},
        "D32": {"unit": "ms", "median": 8.0, "batch": 32, "share_of_floor": 0.8},
        "P 256": {"unit": "tok/s", "median": 50000.0, "share_of_floor": 0.25},
    }[name]
    if computes_on == "cpu":
        del figures["share_of_floor"]
    return {
        "bench": "workloads",
        "name": name,
        "device": device() | {"computes_on": computes_on},
        "settings": {"model": model, **settings},
        "figures": figures,
    }


def write(path: Path, *lines: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(one) for one in lines) + "\n")
    return str(path)


def test_a_token_costs_at_least_the_bytes_that_a_step_reads(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    argv = [tiny_model, *ON_CARD, "--dtype", "bfloat16", "--max-num-seqs", "4"]
    cost = costs(argv, capsys)["asked"]["floor"]["100:20"]
    assert cost["num_requests"] == 4
    # 0.001 dollars a second. Bytes of 2 layers and the output's matrix, read once for 4 tokens, and
    # of 111 tokens of each sequence (2 layers x (K + V) x 2 heads x 16 numbers x 2 bytes).
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    hidden, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    kv = 2 * 16
    layer = 2 * hidden * hidden + 2 * kv * hidden + 3 * mlp * hidden + 2 * hidden
    numbers = 2 * layer + hidden + vocab * hidden + 4 * hidden
    step = (2 * numbers + 4 * 111 * 2 * 2 * kv * 2) / CEILINGS[CARD].bytes_per_second
    assert cost["token_ms"] == pytest.approx(1e3 * step, rel=0.02)
    assert cost["output_dollars"] == pytest.approx(1e6 * step / 4 * 0.001, rel=0.02)
    wanted = (100 * cost["input_dollars"] + 20 * cost["output_dollars"]) / 1000
    assert cost["thousand_requests_dollars"] == pytest.approx(wanted)


def test_only_what_is_computed_of_a_prompt_is_paid(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    cost = costs([tiny_model, *ON_CARD], capsys)["asked"]["floor"]["300:200:50"]
    wanted = (100 * cost["input_dollars"] + 50 * cost["output_dollars"]) / 1000
    assert cost["thousand_requests_dollars"] == pytest.approx(wanted)


def test_options_change_what_it_costs_and_gpus_are_all_paid(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    told = costs([tiny_model, *ON_CARD, "--max-num-seqs", "4"], capsys)
    asked, changes = told["asked"], told["changes"]
    output = asked["floor"]["100:20"]["output_dollars"]
    smaller = changes["--dtype bfloat16"]["floor"]["100:20"]["output_dollars"]
    assert smaller == pytest.approx(output / 2, rel=0.05)
    two = changes["--tensor-parallel-size 2"]
    assert two["num_devices"] == 2
    # Half the time of twice the GPUs: what they tell each other is not counted.
    assert two["floor"]["100:20"]["output_dollars"] == pytest.approx(output, rel=0.01)
    assert two["floor"]["100:20"]["token_ms"] == pytest.approx(
        asked["floor"]["100:20"]["token_ms"] / 2, rel=0.01
    )


def test_what_was_measured_scales_the_floor_and_hints_at_other_options(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    names = ("D1", "D32", "P 256")
    path = write(tmp_path / "lines.jsonl", *(line(tiny_model, name) for name in names))
    argv = [tiny_model, *ON_CARD, "--measured", path, "--max-num-seqs"]
    for most, share in (("1", 0.5), ("40", 0.8)):
        told = costs([*argv, most], capsys)
        floor, known = (told["asked"][kind]["100:20"] for kind in ("floor", "known"))
        assert known["source"] == "measured"
        assert known["output_dollars"] == pytest.approx(floor["output_dollars"] / share)
        assert known["input_dollars"] == pytest.approx(floor["input_dollars"] / 0.25)
        other = told["changes"]["--dtype bfloat16"]
        assert other["known"]["100:20"]["source"] == "estimated"
        assert other["known"]["100:20"]["output_dollars"] == pytest.approx(
            other["floor"]["100:20"]["output_dollars"] / share
        )


def test_lines_of_other_options_and_machines_do_not_count(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = [line(tiny_model, name, dtype="bfloat16") for name in ("D1", "P 256")]
    path = write(tmp_path / "lines.jsonl", *lines)
    told = costs([tiny_model, *ON_CARD, "--measured", path], capsys)
    assert told["asked"]["known"]["100:20"] is None
    assert told["changes"]["--dtype bfloat16"]["known"]["100:20"]["source"] == "measured"
    for wrong in (line(tiny_model, "D1", "another card"), line("another model", "D1")):
        path = write(tmp_path / "lines.jsonl", wrong)
        assert main(["plan", tiny_model, *ON_CARD, "--price=3", "--measured", path]) != 0
        assert f"is of {tiny_model} on {CARD}" in capsys.readouterr().err


def test_on_a_cpu_measured_seconds_are_what_counts(
    tiny_model: str, no_kept_lines: Path, capsys: pytest.CaptureFixture[str]
):
    on_cpu = [tiny_model, "--device", "cpu"]
    assert costs(on_cpu, capsys)["asked"]["known"]["100:20"] is None
    assert main(["plan", *on_cpu, "--price=3"]) == 0
    assert "nothing was measured on" in capsys.readouterr().out
    lines = [line(tiny_model, name, "cpu") for name in ("D32", "P 256")]
    write(no_kept_lines / "workloads.jsonl", *lines)
    told = costs(on_cpu, capsys)
    cost = told["asked"]["known"]["100:20"]
    assert told["asked"]["floor"]["100:20"] is None
    assert (cost["num_requests"], cost["token_ms"]) == (32, pytest.approx(8.0))
    assert cost["output_dollars"] == pytest.approx(1e6 * 0.008 / 32 * 0.001)
    assert cost["input_dollars"] == pytest.approx(1e6 / 50000 * 0.001)
    assert all(one["known"]["100:20"] is None for one in told["changes"].values())


def test_an_option_that_the_weights_format_rules_out_costs_only_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    packed = str(write_quantised_gguf(tmp_path / "m.gguf"))
    changes = costs([packed, "--device=cpu"], capsys)["changes"]
    assert "--kv-cache-dtype int8" in changes
    assert "--tensor-parallel-size 2" not in changes  # packed matrices are not split on a CPU


def test_what_bench_keeps_is_found(
    tiny_model: str, no_kept_lines: Path, capsys: pytest.CaptureFixture[str]
):
    argv = ["--input-len=40", "--output-len=8", "--batch-size=2", "--repeat=1", "--keep"]
    engine = ["--device=cpu", "--load-format=dummy", "--kv-cache-memory=8MiB"]
    engine.append("--skip-tokenizer-init")
    assert main(["bench", "latency", tiny_model, *argv, *engine]) == 0
    capsys.readouterr()
    (kept,) = no_kept_lines.glob("*.jsonl")
    figures = json.loads(kept.read_text())["figures"]
    cost = costs([tiny_model, "--device=cpu"], capsys)["asked"]["known"]["100:20"]
    assert cost["token_ms"] == pytest.approx(figures["tpot_p50_ms"], rel=1e-4)
    assert cost["num_requests"] == 2


def test_the_text_has_both_tables(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "l.jsonl", *(line(tiny_model, name) for name in ("D32", "P 256")))
    argv = ["plan", tiny_model, *ON_CARD, "--price=2.5", "--workloads=100:20,9000:30"]
    assert main([*argv, "--measured", path]) == 0
    text = capsys.readouterr().out
    assert "at $2.5 an hour and GPU" in text
    rows = [one for one in text.splitlines() if "100 in, 20 out" in one]
    assert [one.split()[-1] for one in rows] == ["floor", "measured"]
    assert "9,000 in, 30 out" in text
    assert "does not fit" in text
    assert "D32 (decode, 80% of its floor)" in text
    assert "estimated: its floor, at the share of it that was measured as asked" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--price=0"], "is no price"),
        (["--price=nan"], "is no price"),
        (["--price=3", "--workloads=100:100:5"], "fewer are cached"),
        (["--price=3", "--workloads=100"], "is no workload"),
        (["--price=3", "--measured=/no/such/file"], "cannot be read"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_what_is_no_price_is_refused(
    tiny_model: str, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    with contextlib.suppress(SystemExit):  # what argparse refuses ends the program
        assert main(["plan", tiny_model, *ON_CARD, *argv]) != 0
    assert words in capsys.readouterr().err


def test_a_file_of_other_things_is_refused_with_its_line(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "lines.jsonl"
    good = json.dumps(line(tiny_model, "D1"))
    for bad in ("{", "[]", '{"bench": "serve"}', "3"):
        path.write_text(f"{good}\n\n{bad}\n")
        argv = ["plan", tiny_model, *ON_CARD, "--price=3", "--measured", str(path)]
        assert main(argv) != 0
        assert f"{path}:3 is no line of octavo bench" in capsys.readouterr().err
