"""LLM as a user meets it, on tiny random models: nothing around a request changes its tokens.

On a machine with a GPU all of it runs there too; elsewhere a little of it runs through Triton's
interpreter, which takes seconds a step.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, ConfigError, RequestError, SamplingParams
from octavo.errors import CapacityError, EngineDeadError, OutOfMemoryError
from octavo.kernels.registry import Needs, select_ops
from octavo.runner import sampler
from octavo.step import StepResult
from tests.engine.prompts import VOCAB, greedy, prompts_of, tokens
from tests.engine.tiny_llm import HAS_GPU, device_of, engine, flat_scores, reference_greedy, scores
from tests.models.tiny import TinyModel, save_tiny

LONG = {"max_model_len": 4096, "allow_longer_than_trained": True}
FAMILIES = ("llama", "mistral-window", "qwen3-mixed", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe")


@pytest.fixture(scope="module", params=("reference", "native", *["triton"] * HAS_GPU))
def backend(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    try:
        select_ops(request.param, Needs(device=torch.device(device_of(request.param))))
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


def test_greedy_tokens_are_those_of_transformers_cold_and_from_the_prefix_cache(
    tiny: TinyModel, backend: str
) -> None:
    prompts = prompts_of((70, 3, 33, 48))
    expected = [reference_greedy(tiny, prompt, 12) for prompt in prompts]
    with engine(tiny, backend, max_num_batched_tokens=23) as llm:
        assert tokens(llm.generate(prompts, greedy(12), use_tqdm=False)) == expected
        again = llm.generate(prompts, greedy(12), use_tqdm=False)
        assert tokens(again) == expected
        assert [output.num_cached_tokens for output in again] == [64, 0, 32, 32]


def test_alone_in_a_batch_chunked_and_from_the_cache_are_equal_bit_by_bit(
    tiny: TinyModel, backend: str
) -> None:
    if backend == "reference":
        pytest.skip("torch's products depend on the batch; the native kernels do not")
    prompts = prompts_of((90, 17, 40, 5, 64), seed=1)
    params = greedy(10, logprobs=5)
    with engine(tiny, backend, prefix_caching="off", deterministic=True) as llm:
        alone = [scores(llm.generate(p, params, use_tqdm=False)[0]) for p in prompts]
        batch = [scores(o) for o in llm.generate(prompts, params, use_tqdm=False)]
    with engine(tiny, backend, max_num_batched_tokens=19, deterministic=True) as llm:
        chunked = [scores(o) for o in llm.generate(prompts, params, use_tqdm=False)]
        warm = llm.generate(prompts, params, use_tqdm=False)
    assert sum(output.num_cached_tokens for output in warm) > 0
    assert alone == batch
    assert alone == chunked
    assert alone == [scores(output) for output in warm]


@pytest.mark.skipif(not HAS_GPU, reason="graphs are a GPU's")
def test_graphs_change_no_bit(tiny: TinyModel) -> None:
    prompts = prompts_of((50, 17, 3, 30, 41, 8, 22), seed=9)
    # Sizes fall as requests end, and come again: built, captured, replayed.
    params = [greedy(5 + 4 * i, logprobs=3) for i in range(len(prompts))]
    found: list[list[Any]] = []
    for eager in (True, False):
        with engine(tiny, "triton", enforce_eager=eager) as llm:
            runs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(3)]
            captured = llm._core._runner._forward._graphs._captured  # type: ignore[attr-defined]
            assert bool(captured) != eager
            found.append([scores(output) for outputs in runs for output in outputs])
    assert found[0] == found[1]


@pytest.mark.skipif(HAS_GPU, reason="the whole suite runs on the GPU")
def test_the_gpu_engine_runs_through_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("tests.kernels.triton.interpreter")
    tiny = save_tiny("qwen2-moe", tmp_path)
    prompts = prompts_of((19, 3))
    params = greedy(2, logprobs=2)
    # A longer context has programs that find nothing to do, each a while here.
    with engine(
        tiny, "triton", max_model_len=32, max_num_batched_tokens=16, deterministic=True
    ) as llm:
        cold = llm.generate(prompts, params, use_tqdm=False)
        assert tokens(cold) == [reference_greedy(tiny, prompt, 2) for prompt in prompts]
        warm = llm.generate(prompts[0], params, use_tqdm=False)
        assert warm[0].num_cached_tokens == 16
    # NumPy's products of other shapes round otherwise; on a GPU these are equal bits.
    assert flat_scores(warm[0]) == pytest.approx(flat_scores(cold[0]), abs=1e-4)


def fail_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch, steps: Container[int]) -> None:
    """Has steps, counted by `num_steps`, run but find no memory at their end."""
    runner = llm._core._runner
    collect = runner.collect

    def fail(ticket: object) -> StepResult:
        result = collect(ticket)
        if result.step_id in steps:
            raise OutOfMemoryError(f"no memory for step {result.step_id}")
        return result

    monkeypatch.setattr(runner, "collect", fail)


def test_steps_without_memory_change_no_token(
    tiny: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of((70, 3, 33, 48))
    params = greedy(12, n=2)
    with engine(tiny, backend, max_num_batched_tokens=40) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
        first = llm.stats().num_steps
        assert llm.reset_prefix_cache()
        fail_steps(llm, monkeypatch, {first + step for step in (0, 1, 3, 6, 13)})
        found = llm.generate(prompts, params, use_tqdm=False)
        for one, other in zip(found, expected, strict=True):
            assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
        assert llm.stats().num_lost_steps == 4  # step 1 was lost with step 0
        assert llm.stats().num_preemptions >= 4


def test_memory_that_never_comes_ends_requests_with_the_error_and_the_engine_lives(
    mixtral: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts_of((20,))[0]
    with engine(mixtral, backend) as llm:
        fail_steps(llm, monkeypatch, range(3, 50))
        (ended,) = llm.generate(prompt, greedy(9), use_tqdm=False)[0].outputs
        assert ended.finish_reason == "error"
        assert "no memory for step" in str(ended.stop_reason)
        monkeypatch.undo()
        output = llm.generate(prompt, greedy(9), use_tqdm=False)
        assert tokens(output) == [reference_greedy(mixtral, prompt, 9)]


def test_only_the_request_whose_sampling_raises_ends_with_the_error(
    mixtral: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if HAS_GPU and backend == "triton":
        pytest.skip("a device draws all rows in one kernel, where none raises alone")
    choose = sampler._choose

    def raise_for_the_guilty(logits: Any, state: Any, output_index: int, *masks: Any) -> int:
        if state.params.seed == 7 and output_index == 3:
            raise ValueError("a fault of this row")
        return choose(logits, state, output_index, *masks)

    prompts = prompts_of((30, 12, 50, 21, 5), seed=6)
    params = [
        # A row of the host's sampler on every back end.
        SamplingParams(seed=seed, max_tokens=12, ignore_eos=True, min_tokens=1)
        for seed in (5, 6, 7, 8, 9)
    ]
    with engine(mixtral, backend) as llm:
        expected = tokens(llm.generate(prompts, params, use_tqdm=False))
        assert llm.reset_prefix_cache()
        monkeypatch.setattr(sampler, "_choose", raise_for_the_guilty)
        found = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        assert [one.finish_reason for one in found] == ["length"] * 2 + ["error"] + ["length"] * 2
        assert "a fault of this row" in str(found[2].stop_reason)
        assert found[2].token_ids == expected.pop(2)[:3]
        del found[2]
        assert [one.token_ids for one in found] == expected
        llm._core.check()


def test_a_lost_device_ends_the_engine(
    mixtral: TinyModel, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(mixtral, backend) as llm:

        def lose(ticket: object) -> StepResult:
            raise EngineDeadError("the device can be used no more")

        monkeypatch.setattr(llm._core._runner, "collect", lose)
        with pytest.raises(EngineDeadError, match="used no more"):
            llm.generate(prompts_of((5, 6)), greedy(4), use_tqdm=False)


def test_preemption_changes_no_token(tiny: TinyModel, backend: str) -> None:
    if tiny.config["model_type"] == "mistral":
        pytest.skip("all layers forget behind a window: memory does not run out")
    prompts = prompts_of((40, 41, 42, 43, 44), seed=2)
    with engine(tiny, backend) as llm:
        expected = tokens(llm.generate(prompts, greedy(40), use_tqdm=False))
        page = llm.plan.block_bytes
        groups = len(llm.plan.groups)
    small = page * groups * 14
    with engine(tiny, backend, kv_cache_memory_bytes=small, max_model_len=96) as llm:
        assert tokens(llm.generate(prompts, greedy(40), use_tqdm=False)) == expected
        assert llm.stats().num_preemptions > 0


def test_the_longest_begins_first_and_outputs_come_in_the_order_given(
    tiny: TinyModel, backend: str
) -> None:
    prompts = prompts_of((5, 9, 7, 6, 8))
    params = [greedy(count) for count in (2, 9, 4, 9, 20)]
    with engine(tiny, backend, max_num_seqs=1) as llm:
        expected = [tokens(llm.generate(p, q)) for p, q in zip(prompts, params, strict=True)]
        found = llm.generate(prompts, params, priority=[0, 0, 0, 0, 1])
        assert [[one] for one in tokens(found)] == expected
        ended = [output.metrics.finished_time for output in found if output.metrics is not None]
        assert sorted(range(5), key=lambda index: ended[index] or 0.0) == [1, 3, 2, 0, 4]


def test_a_seed_draws_the_same_tokens_in_any_company(mixtral: TinyModel, backend: str) -> None:
    prompts = prompts_of((30, 12, 50), seed=3)
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, top_k=20, seed=i, max_tokens=12, ignore_eos=True)
        for i in range(3)
    ]
    with engine(mixtral, backend) as llm:
        together = tokens(llm.generate(prompts, params, use_tqdm=False))
        for prompt, param, expected in zip(prompts, params, together, strict=True):
            assert tokens(llm.generate(prompt, param, use_tqdm=False)) == [expected]
        other = llm.generate(prompts[0], SamplingParams(seed=9, max_tokens=12), use_tqdm=False)
        assert tokens(other) != together[:1]


def test_parallel_samples_are_the_runs_of_their_seeds(mixtral: TinyModel, backend: str) -> None:
    prompt = prompts_of((37,), seed=4)[0]
    with engine(mixtral, backend) as llm:
        output = llm.generate(prompt, greedy(8, n=3), use_tqdm=False)[0]
        assert output.finished
        texts = [completion.token_ids for completion in output.outputs]
        assert texts[0] == texts[1] == texts[2] == reference_greedy(mixtral, prompt, 8)
        params = SamplingParams(n=4, seed=5, max_tokens=16, ignore_eos=True)
        drawn = [c.token_ids for c in llm.generate(prompt, params, use_tqdm=False)[0].outputs]
        assert len({tuple(ids) for ids in drawn}) == 4
        again = [c.token_ids for c in llm.generate(prompt, params, use_tqdm=False)[0].outputs]
        assert again == drawn


def test_prompt_logprobs_are_those_of_transformers(mixtral: TinyModel, backend: str) -> None:
    prompt = prompts_of((45,), seed=5)[0]
    with torch.inference_mode():
        logits = mixtral.reference(torch.tensor([prompt])).logits[0]
    expected = torch.log_softmax(logits, dim=-1)
    with engine(mixtral, backend, max_num_batched_tokens=16) as llm:
        llm.generate(prompt, greedy(1), use_tqdm=False)
        output = llm.generate(prompt, greedy(1, prompt_logprobs=2), use_tqdm=False)[0]
    found = output.prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert len(found) == len(prompt)
    for position, entries in enumerate(found[1:], start=1):
        assert entries is not None
        own = entries[prompt[position]]
        best = sorted(entries.values(), key=lambda entry: entry.rank or 0)[:2]
        assert own.token_id == prompt[position]
        assert own.logprob == pytest.approx(expected[position - 1, own.token_id].item(), abs=1e-4)
        top = expected[position - 1].topk(2)
        assert [entry.token_id for entry in best] == top.indices.tolist()


def test_another_salt_shares_nothing_and_a_request_can_opt_out(
    mixtral: TinyModel, backend: str
) -> None:
    prompt = prompts_of((40,), seed=6)[0]
    with engine(mixtral, backend) as llm:
        llm.generate(prompt, greedy(1), use_tqdm=False, cache_salt="a")
        for salt, more, cached in (
            ("b", {}, 0),
            ("a", {"prefix_caching": "off"}, 0),
            ("a", {}, 32),
        ):
            output = llm.generate(prompt, greedy(1, **more), use_tqdm=False, cache_salt=salt)[0]
            assert output.num_cached_tokens == cached
        assert llm.reset_prefix_cache()
        output = llm.generate(prompt, greedy(1), use_tqdm=False, cache_salt="a")[0]
        assert output.num_cached_tokens == 0


def test_an_engine_without_prefix_caching_still_serves_a_request_that_wants_it(
    mixtral: TinyModel, backend: str
) -> None:
    prompt = prompts_of((40,), seed=7)[0]
    with engine(mixtral, backend, prefix_caching="off") as llm:
        for more, cached in (
            ({}, 0),
            ({"prefix_caching": "on"}, 0),
            ({"prefix_caching": "on"}, 32),
        ):
            output = llm.generate(prompt, greedy(1, **more), use_tqdm=False)[0]
            assert output.num_cached_tokens == cached


def test_sixteen_requests_at_once_compute_a_shared_prefix_once(
    mixtral: TinyModel, backend: str
) -> None:
    prefix, *tails = prompts_of((160, *[9] * 16), seed=8)
    with engine(mixtral, backend, max_num_batched_tokens=512) as llm:
        llm.generate([prefix + tail for tail in tails], greedy(1), use_tqdm=False)
        stats = llm.stats()
        computed = stats.num_step_tokens
    assert computed <= 160 + 16 * 9


def test_every_token_of_a_moe_layer_is_counted_for_its_experts(
    mixtral: TinyModel, backend: str
) -> None:
    with engine(mixtral, backend) as llm:
        llm.generate(prompts_of((40,))[0], greedy(5), use_tqdm=False)
        stats = llm.stats()
    assert len(stats.expert_counts) == 3
    for layer in stats.expert_counts:
        assert sum(layer) == 2 * stats.num_step_tokens


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_model_lenn": 5}, ConfigError, "did you mean max_model_len"),
        (
            {"attention_backend": "FLASH"},
            ConfigError,
            "valid are auto, triton, native, refer.*, Page",
        ),
        ({"max_model_len": 4096}, ConfigError, "max_model_len 4096 is more than the 256 tokens"),
        ({**LONG, "kv_cache_memory_bytes": 2**20}, CapacityError, "max_model_len"),
        ({"gpu_memory_utilization": 0.0}, ConfigError, "gpu_memory_utilization must be above 0"),
        ({"dtype": "int3"}, ConfigError, "use auto, float32"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    mixtral: TinyModel, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LLM(str(mixtral.folder), device="cpu", skip_tokenizer_init=True, **options)


def test_a_bad_prompt_is_refused_before_anything_runs_and_harms_nobody(
    mixtral: TinyModel, backend: str
) -> None:
    good = prompts_of((10,))[0]
    with engine(mixtral, backend) as llm:
        for bad, says in (([], "empty"), ([VOCAB], "211"), ([1] * 300, "300")):
            with pytest.raises(RequestError, match=says):
                llm.generate([good, bad], greedy(2), use_tqdm=False)
        assert len(tokens(llm.generate(good, greedy(2), use_tqdm=False))[0]) == 2
