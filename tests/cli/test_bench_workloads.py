"""octavo bench workloads, named shapes, and their floors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo import LLM
from octavo.cli import main
from octavo.cli.bench.device_profile import Activity, profile_decode, summarize
from octavo.cli.bench.floors import CEILINGS, Floors, Work
from octavo.cli.bench.shapes import FULL, MODELS, QUICK, engine_values, mixed_requests
from octavo.cli.bench.workloads import Workloads
from octavo.engine.core import EngineCore
from octavo.errors import OctavoError
from octavo.formats import kv_formats
from octavo.models.registry import read_spec
from octavo.request import Request
from tests.cli.bench_lines import lines_of

# -- named workloads -----------------------------------------------------------------------------


def floors_of(name: str) -> Floors:
    spec, _ = read_spec(MODELS[name].config)
    return Floors(spec, element_bytes=2, kv=kv_formats("bfloat16"))


@pytest.mark.parametrize(
    ("name", "one", "batch", "hit"),
    [("qwen3-30b-a3b", 2.05, 18.9, 20.9), ("qwen1.5-moe-a2.7b", 1.63, 10.8, 11.4)],
)
def test_floors_are_those_worked_out_by_hand(name: str, one: float, batch: float, hit: float):
    h100, floors = CEILINGS["NVIDIA H100 80GB HBM3"], floors_of(name)

    def ms(work: Work) -> float:
        return 1e3 * work.seconds(h100)

    assert ms(floors.step([(1, 640)])) == pytest.approx(one, abs=0.01)
    assert ms(floors.step([(1, 1152)] * 32)) == pytest.approx(batch, abs=0.05)
    assert ms(floors.step([(64, 0)], shared=32768)) == pytest.approx(hit, abs=0.05)


def test_a_shared_prefix_is_read_once_and_multiplied_by_all():
    floors = floors_of("qwen3-30b-a3b")
    own = floors.step([(1, 1000)] * 4)
    shared = floors.step([(1, 0)] * 4, shared=1000)
    token_bytes = 48 * 2 * 4 * 128 * 2
    assert own.bytes_ - shared.bytes_ == pytest.approx(3 * 1000 * token_bytes)
    assert own.flops == shared.flops


def test_mixed_requests_decode_side_by_side_until_each_ends():
    floors = floors_of("qwen3-30b-a3b")
    steps = [floors.step([(1, 11), (1, 21)]), floors.step([(1, 22)])]
    work = floors.mixed([10, 20], [2, 3])
    assert work.bytes_ == pytest.approx(sum(step.bytes_ for step in steps))
    prefill = floors.step([(10, 0), (20, 0)])
    assert work.flops == pytest.approx(prefill.flops + sum(step.flops for step in steps))


@given(st.integers(64, 50_000))
def test_sizes_fit_any_context(length: int):
    for sizes in (FULL, QUICK):
        fitted = sizes.within(length)
        for batch in (fitted.mixed, fitted.single, fitted.batch, fitted.shared):
            assert batch.prompt >= 1
            assert batch.output >= 2
            assert batch.prompt + batch.output <= length
        assert fitted.prefix + fitted.shared.prompt + fitted.shared.output <= length
        assert fitted.prefix >= 16
        assert max(fitted.prefills) < length
        assert 1 <= fitted.mixed_low <= min(fitted.mixed.prompt, fitted.mixed.output) // 2
    assert replace(FULL.within(40_960), document=FULL.document) == FULL
    assert FULL.within(2 * FULL.document) == FULL


def test_mixed_requests_are_the_peers():
    prompts, outputs = mixed_requests(151936, FULL.mixed, FULL.mixed_low, 0)
    # As drawn by the script that measured the peer.
    assert (sum(map(len, prompts)), sum(outputs)) == (144_831, 144_160)
    assert prompts[0][:3] == [109306, 45520, 125313]


def test_overlapping_activities_are_busy_once():
    profile = summarize(
        [Activity("b", 15, 30), Activity("a", 10, 20), Activity("a", 12, 14), Activity("b", 50, 60)]
    )
    assert profile.span_seconds == pytest.approx(50e-6)
    assert profile.busy_seconds == pytest.approx(30e-6)
    assert [(name, count) for name, _, count in profile.kernels] == [("b", 2), ("a", 2)]
    assert summarize([]).busy_seconds == 0


def test_decoding_is_profiled_in_full_steps_and_leaves_the_engine_idle(tiny_model: str):
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "num_threads": 1}
    llm = LLM(tiny_model, device="cpu", **options)
    before: list[int] = []

    def record(run: Any) -> Any:
        before.append(llm.stats().num_generation_tokens)
        run()
        before.append(llm.stats().num_generation_tokens)
        return summarize([])

    profile_decode(llm.core, [[5] * 20, [6] * 30, [7] * 10], 8, record)
    assert before[-1] - before[-2] == 3 * 8
    assert not llm.core.has_work
    llm.core.check()
    llm.close()


WORKLOADS = ["start", "warm-up", "D1", "D32", "P 511", "Ha", "Hb", "T", "T in the order given"]


def test_all_workloads_run_on_a_small_model(tiny_options: list[str], tmp_path: Path):
    assert main(["bench", "workloads", *tiny_options, "--quick"]) == 0
    lines = {line["name"]: line["figures"] for line in lines_of(tmp_path / "out.jsonl")}
    assert list(lines) == WORKLOADS
    assert lines["start"]["kv_tokens"] > 1000
    for name in WORKLOADS[4:]:
        assert lines[name]["median"] > 0
        assert "floor" not in lines[name]
    prefix = lines["Ha"]["prefix"]
    assert lines["Ha"]["cached_tokens"] == [prefix, prefix]
    assert lines["Hb"]["cached_tokens"] == [8 * prefix] * 2
    assert lines["P 511"]["cached_tokens"] == [0]


def test_mixed_lengths_run_longest_first_and_in_the_order_given(
    tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun: list[int] = []
    add = EngineCore.add

    def noted(self: EngineCore, request: Request) -> None:
        begun.append(request.params.max_tokens or 0)
        add(self, request)

    monkeypatch.setattr(EngineCore, "add", noted)
    assert main(["bench", "workloads", *tiny_options, "--quick", "--only", "T"]) == 0
    lines = {line["name"]: line["figures"] for line in lines_of(tmp_path / "out.jsonl")}
    _, outputs = mixed_requests(512, QUICK.mixed, QUICK.mixed_low, 0)
    assert begun[-16:] == outputs
    assert begun[-32:-16] == sorted(outputs, reverse=True)
    assert lines["T"]["order"] == "longest first"
    assert lines["T in the order given"]["order"] == "as given"


def test_what_a_workload_cannot_do_is_said(
    tiny_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for options, message in (
        (["--only", "D1,K"], "K profiles a CUDA device"),
        (["--layers", "1"], "--layers cuts one of qwen3-30b-a3b"),
        (["--only", "P"], "the context holds 512"),
    ):
        assert main(["bench", "workloads", *tiny_options, *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "workloads", *tiny_options, "--only", "D2"])


def test_one_that_fails_does_not_take_the_others_along(
    tiny_options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: Workloads, *_: object) -> None:
        raise OctavoError("no luck")

    monkeypatch.setattr(Workloads, "decode", fail)
    assert main(["bench", "workloads", *tiny_options, "--quick", "--only", "D1,P"]) == 1
    lines = {line["name"]: line["figures"] for line in lines_of(tmp_path / "out.jsonl")}
    assert lines["D1"] == {"error": "OctavoError: no luck"}
    assert lines["P 511"]["median"] > 0


def test_a_named_shape_is_written_as_a_model_with_random_weights(tmp_path: Path):
    values = engine_values("qwen3-30b-a3b", {"max_model_len": 2048}, tmp_path, 2)
    assert (values["load_format"], values["max_model_len"]) == ("dummy", 2048)
    spec, _ = read_spec(json.loads((tmp_path / "config.json").read_text()))
    assert (len(spec.layers), spec.max_experts) == (2, 128)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_shape_that_is_offered_runs_with_one_layer_on_a_cpu(name: str, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    engine = ["--device=cpu", "--kv-cache-memory=16MiB", "--max-model-len=128"]
    sizes = ["--layers=1", "--quick", "--only=D1,Ha", f"--output={output}"]
    assert main(["bench", "workloads", name, *engine, *sizes]) == 0
    lines = {line["name"]: line["figures"] for line in lines_of(output)}
    # A difference of two runs, and so below 0 where others use the machine.
    assert lines["D1"]["median"] == pytest.approx(lines["D1"]["best"])
    assert min(lines["D1"]["full_seconds"]) > 0
    assert lines["Ha"]["median"] > 0
