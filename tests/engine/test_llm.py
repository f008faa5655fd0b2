"""LLM as a user meets it, on tiny random models: nothing around a request changes its tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from octavo import LLM, ConfigError, RequestError, RequestOutput, SamplingParams
from octavo.errors import CapacityError
from octavo.kernels.registry import Needs, select_ops
from tests.models.tiny import TinyModel, save_tiny

VOCAB = 211
FAMILIES = ("llama", "mistral-window", "qwen3-mixed", "mixtral", "qwen2-moe", "qwen3-moe", "olmoe")


@pytest.fixture(scope="module", params=("reference", "native"))
def backend(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    try:
        select_ops(request.param, Needs())
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return save_tiny("mixtral", tmp_path_factory.mktemp("mixtral"))


@contextmanager
def engine(model: TinyModel, backend: str, **options: Any) -> Iterator[LLM]:
    defaults = {
        "attention_backend": backend,
        "skip_tokenizer_init": True,
        "poison_freed_blocks": True,
        "num_threads": 1,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 4 * 2**20,
    }
    llm = LLM(str(model.folder), **{**defaults, **options})
    try:
        yield llm
        llm._core.check()
        assert llm.stats().num_used_blocks == 0
    finally:
        llm.close()


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(length)] for length in lengths]


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def scores(output: RequestOutput) -> list[list[tuple[int, float]]]:
    """Token and log-probability of every reported candidate, to compare bit by bit."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return [[(entry.token_id, entry.logprob) for entry in position] for position in logprobs]


def reference_greedy(model: TinyModel, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(count):
            logits = model.reference(ids).logits[0, -1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], dim=1)
    return ids[0, len(prompt) :].tolist()


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
    with engine(tiny, backend, prefix_caching="off") as llm:
        alone = [scores(llm.generate(p, params, use_tqdm=False)[0]) for p in prompts]
        batch = [scores(o) for o in llm.generate(prompts, params, use_tqdm=False)]
    with engine(tiny, backend, max_num_batched_tokens=19) as llm:
        chunked = [scores(o) for o in llm.generate(prompts, params, use_tqdm=False)]
        warm = llm.generate(prompts, params, use_tqdm=False)
    assert sum(output.num_cached_tokens for output in warm) > 0
    assert alone == batch == chunked == [scores(output) for output in warm]


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
        own, *best = entries
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
        ({"max_model_len": 4096, "kv_cache_memory_bytes": 2**20}, CapacityError, "max_model_len"),
        ({"gpu_memory_utilization": 0.0}, ConfigError, "gpu_memory_utilization must be above 0"),
        ({"dtype": "int3"}, ConfigError, "use auto, float32"),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(
    mixtral: TinyModel, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        LLM(str(mixtral.folder), skip_tokenizer_init=True, **options)


def test_a_bad_prompt_is_refused_before_anything_runs_and_harms_nobody(
    mixtral: TinyModel, backend: str
) -> None:
    good = prompts_of((10,))[0]
    with engine(mixtral, backend) as llm:
        for bad, says in (([], "empty"), ([VOCAB], "211"), ([1] * 300, "300")):
            with pytest.raises(RequestError, match=says):
                llm.generate([good, bad], greedy(2), use_tqdm=False)
        assert len(tokens(llm.generate(good, greedy(2), use_tqdm=False))[0]) == 2
