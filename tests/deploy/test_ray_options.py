"""What an app on Ray is made of, and what a cluster must have for it; no Ray is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from octavo.deploy.ray.autoscaling import KV_USE, QueueAndCache
from octavo.deploy.ray.options import for_cluster, read_app_options
from octavo.deploy.ray.replica import KV_USE as TOLD
from octavo.errors import ConfigError

ARGS: dict[str, Any] = {"model": "demo-moe", "engine": {"device": "cpu"}}


def test_options_are_those_of_octavo_serve_by_their_names() -> None:
    options = read_app_options(
        {
            **ARGS,
            "engine": {"device": "cpu", "max_model_len": "1K", "max_num_seqs": 32},
            "server": {"served_model_name": ["chat"], "api_key": ["k"]},
            "max_replicas": 3,
        }
    )
    assert options.engine.max_model_len == 1024
    assert options.server.served_model_name == ("chat",)
    assert (options.min_replicas, options.max_replicas) == (1, 3)
    assert options.target_requests == 16


@pytest.mark.parametrize(
    ("args", "field", "said"),
    [
        ({"modle": "demo"}, "modle", "valid are .* model,"),
        ({**ARGS, "max_replica": 2}, "max_replica", "do you mean max_replicas"),
        ({}, "model", "args needs model"),
        ({**ARGS, "engine": {"max_modle_len": 5}}, "max_modle_len", "max_model_len"),
        ({**ARGS, "engine": []}, None, None),
        ({**ARGS, "engine": ["x"]}, "engine", "must be a mapping"),
        ({**ARGS, "engine": {"data_parallel_size": 2}}, "data_parallel_size", "max_replicas"),
        ({**ARGS, "server": {"port": 80}}, "port", "http_options"),
        ({**ARGS, "server": {"api_keys": []}}, "api_keys", "do you mean api_key"),
        ({**ARGS, "min_replicas": 0}, "min_replicas", "at least 1, got 0"),
        ({**ARGS, "min_replicas": True}, "min_replicas", "got True"),
        ({**ARGS, "min_replicas": 3}, "max_replicas", "less than min_replicas, 3"),
        ({**ARGS, "target_kv": 0}, "target_kv", "above 0, got 0"),
        ({**ARGS, "cpus_per_rank": "two"}, "cpus_per_rank", "at least 0, got 'two'"),
        ({**ARGS, "downscale_delay_s": float("nan")}, "downscale_delay_s", "got nan"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(
    args: dict[str, Any], field: str | None, said: str | None
) -> None:
    if field is None:
        read_app_options(args)
        return
    with pytest.raises(ConfigError, match=said) as caught:
        read_app_options(args)
    assert caught.value.field == field


def test_a_cluster_without_what_is_asked_for_is_told_of() -> None:
    engine = {"device": "cuda", "tensor_parallel_size": 2}
    options = read_app_options({**ARGS, "engine": engine, "min_replicas": 2, "max_replicas": 2})
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0, "memory": 1.0}]
    with pytest.raises(ConfigError) as caught:
        for_cluster(options, nodes)
    assert (
        "2 replicas of 2 ranks (1 CPU, 1 GPU each) and 1 ingresses need 5 CPU, 4 GPU; the cluster "
        "has 2 nodes: 8 CPU, 2 GPU; 2 CPU."
    ) in str(caught.value)
    with pytest.raises(ConfigError, match="0 nodes: none"):
        for_cluster(options, [])
    assert for_cluster(options, [{"CPU": 5.0, "GPU": 4.0}]).gpus_per_rank == 1


def test_what_is_still_to_come_is_not_refused() -> None:
    options = read_app_options({**ARGS, "wait_for_resources": True})
    assert for_cluster(options, []).gpus_per_rank == 0


@pytest.mark.parametrize(
    ("device", "gpus", "wanted"), [("auto", 0, 0), ("auto", 1, 1), ("cpu", 1, 0), ("cuda", 1, 1)]
)
def test_a_rank_has_a_gpu_where_the_cluster_has_some(device: str, gpus: int, wanted: int) -> None:
    options = read_app_options({**ARGS, "engine": {"device": device}})
    assert for_cluster(options, [{"CPU": 4, "GPU": gpus}]).gpus_per_rank == wanted


def test_pieces_must_each_fit_a_node() -> None:
    options = read_app_options({**ARGS, "cpus_per_rank": 4})
    for_cluster(options, [{"CPU": 1}, {"CPU": 4}])
    with pytest.raises(ConfigError, match="need 5 CPU; the cluster has 2 nodes: 3 CPU; 3 CPU"):
        for_cluster(options, [{"CPU": 3}, {"CPU": 3}])


def context(requests: float, uses: dict[str, float]) -> Any:
    return SimpleNamespace(total_num_requests=requests, aggregated_metrics={KV_USE: uses})


@settings(max_examples=30, deadline=None)
@given(requests=st.integers(0, 10_000), uses=st.lists(st.integers(0, 100), max_size=8))
def test_so_many_engines_are_wanted_that_none_is_above_its_targets(
    requests: int, uses: list[int]
) -> None:
    policy = QueueAndCache(target_requests=16, target_kv=0.8)
    named = {str(place): use / 100 for place, use in enumerate(uses)}
    wanted, state = policy(context(requests, named))
    assert state == {}
    used = sum(uses) / 100
    assert requests <= wanted * 16 + 1e-9
    assert used <= wanted * 0.8 + 1e-9
    less = 0.99 * wanted
    assert not wanted or requests > less * 16 or used > less * 0.8


def test_nothing_told_of_the_cache_leaves_the_queue() -> None:
    assert KV_USE == TOLD
    silent: Any = SimpleNamespace(total_num_requests=8.0, aggregated_metrics=None)
    assert QueueAndCache(target_requests=4, target_kv=0.8)(silent) == (2.0, {})
