"""`octavo plan` from a config alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest

from octavo.cli import main
from octavo.cli.plan.parts import PART_NAMES, spec_parts
from octavo.models.registry import read_spec
from tests.models import tiny
from tests.weights.tiny_gguf import write_quantised_gguf


def plan(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Of the CPU unless `argv` names a device: the machine may have a GPU."""
    assert main(["plan", "--device", "cpu", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_is_enough(tiny_model: str, capsys: pytest.CaptureFixture[str]):
    made = plan([tiny_model, "--memory", "1GiB"], capsys)
    # 2 layers x (K + V) x 2 heads x 16 numbers x 4 bytes
    assert made["kv_token_bytes"] == 2 * 2 * 2 * 16 * 4
    assert made["weights_bytes"] == 4 * made["num_parameters"]
    assert made["available_bytes"] == 2**30
    assert made["max_model_len"] == 512


def test_a_reader_that_has_seen_enough_is_no_traceback(tiny_model: str):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [sys.executable, "-c", "from octavo.cli import main; main()", "plan", tiny_model]
    done = subprocess.run(argv, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert done.stderr == ""


def test_the_parts_add_up_to_the_weights(tiny_model: str, capsys: pytest.CaptureFixture[str]):
    made = plan([tiny_model, "--dtype", "float16"], capsys)
    assert sum(made["weights_parts_bytes"].values()) == made["weights_bytes"]
    assert made["weights_bytes"] == 2 * made["num_parameters"]


def test_the_text_names_what_goes_where_and_what_would_change(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", tiny_model, "--device=cpu", "--lengths", "100,400"]) == 0
    text = capsys.readouterr().out
    for words in ("embeddings", "attention", "KV cache", "400 tokens", "--kv-cache-dtype float16"):
        assert words in text


def text_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["plan", *argv]) == 0
    return capsys.readouterr().out


def test_the_text_says_which_device_is_planned_and_how_another_is(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = text_of([tiny_model, "--device=cpu", "--memory=80GiB"], capsys)
    assert "device: cpu, one with 80.00 GiB of memory; --device cuda --memory 80GiB" in text
    assert "activations in float32; --activation-dtype int8" in text
    packed = str(write_quantised_gguf(tmp_path / "m.gguf"))
    text = text_of([packed, "--device=cpu", "--activation-dtype=int8"], capsys)
    assert "packed weights with activations in int8" in text
    assert "device: cpu, this machine's; --device cuda --memory 80GiB plans a GPU" in text
    text = text_of([tiny_model, "--device=cuda", "--memory=24GiB"], capsys)
    assert "device: cuda, one with 24.00 GiB of memory\n" in text


def test_the_text_says_where_the_kv_caches_size_comes_from(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    words = "on a CPU the KV cache takes 4 GiB unless --kv-cache-memory says otherwise"
    many = [tiny_model, "--memory=1000GiB", "--max-num-seqs=100000"]
    assert words in text_of([*many, "--device=cpu"], capsys)
    assert words not in text_of([*many, "--device=cpu", "--kv-cache-memory=2GiB"], capsys)
    assert words not in text_of([*many, "--device=cuda"], capsys)


def test_no_more_requests_are_promised_than_may_run(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    argv = [tiny_model, "--memory=8GiB", "--lengths=16", "--max-num-seqs"]
    assert plan([*argv, "3"], capsys)["num_requests"] == {"16": 3}
    assert plan([*argv, "300"], capsys)["num_requests"] == {"16": 300}


def test_sizes_are_said_to_be_those_of_each_device(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    argv = [tiny_model, "--device=cuda", "--memory=24GiB", "--tensor-parallel-size=2"]
    assert "memory plan of each of 2 devices: " in text_of(argv, capsys)


@pytest.mark.parametrize(
    ("num_experts", "more", "layout", "words"),
    [
        (4, [], "whole", "add --enable-expert-parallel"),
        (4, ["--enable-expert-parallel"], "whole", "as asked"),
        (5, [], "parts", "2 ranks cannot share whole ones"),
    ],
)
def test_how_ranks_should_share_experts_is_said(
    num_experts: int,
    more: list[str],
    layout: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = {**tiny.CASES["qwen3-moe"], "num_experts": num_experts}
    monkeypatch.setitem(tiny.CASES, "qwen3-moe", case)
    model = str(tiny.save_tiny("qwen3-moe", tmp_path).folder)
    argv = [model, "--device=cuda", "--memory=24GiB", "--tensor-parallel-size=2", *more]
    assert plan(argv, capsys)["experts_layout"] == layout
    assert words in text_of(argv, capsys)
    assert plan(argv[:3], capsys)["experts_layout"] is None


def test_a_smaller_kv_format_halves_what_a_token_costs(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    made = plan([tiny_model], capsys)
    other = made["changes"]["--kv-cache-dtype float16"]
    assert other["kv_token_bytes"] * 2 == made["kv_token_bytes"]


def test_a_model_that_does_not_fit_is_an_error_after_its_sizes(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", tiny_model, "--device=cpu", "--memory", "64KiB"]) == 2
    shown = capsys.readouterr()
    assert "embeddings" in shown.out
    assert "What would fit" in shown.err


def test_experts_are_their_own_part(tiny_config: dict[str, Any]):
    config = tiny_config | {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }
    spec, _ = read_spec(config)
    parts = spec_parts(spec, 2)
    assert set(parts) == set(PART_NAMES)
    assert parts["experts"] == 2 * 2 * 4 * 3 * 32 * 64
    assert parts["shared experts"] == 2 * 2 * (3 * 48 * 64 + 64)
    assert sum(parts.values()) == 2 * spec.num_parameters


def test_a_card_that_is_not_here_can_be_planned_for(
    tiny_model: str, capsys: pytest.CaptureFixture[str]
):
    card = plan([tiny_model, "--device", "cuda", "--gpu-memory", "80GiB"], capsys)
    assert card["usable_bytes"] == int(0.9 * 80 * 2**30)
    assert card["max_num_batched_tokens"] == 8192
    assert card["graph_bytes"] > 0
    host = plan([tiny_model, "--device", "cpu", "--memory", "80GiB"], capsys)
    assert host["max_num_batched_tokens"] == 512
    assert host["graph_bytes"] == host["other_bytes"] == 0


def test_a_plan_refuses_what_the_loader_refuses(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    quantised = str(write_quantised_gguf(tmp_path / "m.gguf"))
    other = str(write_quantised_gguf(tmp_path / "n.gguf", gguf.GGMLQuantizationType.TQ1_0))
    on_card = ["--device", "cuda", "--gpu-memory", "24GiB"]
    two = ["--device", "cpu", "--tensor-parallel-size", "2"]
    for argv, words in (
        ([tiny_model, "--max-model-len", "513"], "more than the 512 tokens"),
        ([quantised, *two], "block format q8_0"),
        ([other, *two], "block format tq1_0"),
        ([quantised, *two, "--enable-expert-parallel"], "this model has none"),
        ([quantised, "--device", "cpu", "--enable-expert-parallel"], "this model has none"),
        ([tiny_model, *on_card, "--attention-backend", "native"], "computes on the CPU"),
        ([tiny_model, *on_card, "--activation-dtype", "int8"], "kernels of a CPU"),
        ([tiny_model, "--device", "cpu", "--activation-dtype", "int8"], "are plain numbers"),
    ):
        assert main(["plan", *argv]) != 0
        assert words in capsys.readouterr().err
    for argv in (
        [tiny_model, "--max-model-len", "513", "--allow-longer-than-trained"],
        [quantised, *on_card],
        [other, *on_card],
        [quantised, "--device", "cpu"],
    ):
        assert plan(argv, capsys)["num_blocks"] > 0
