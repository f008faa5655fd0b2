"""Models, tokens, ids, parameters on their way to the engine, metrics over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from octavo import __version__


def test_the_model_is_listed_and_retrieved(client: openai.OpenAI, model: str) -> None:
    [card] = client.models.list().data
    assert client.models.retrieve(card.id) == card
    assert card.id == model


def test_the_served_name_may_differ_and_hold_slashes(start_server: Any) -> None:
    server = start_server(served_model_name=("org/name", "short"))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        assert client.models.list().data[0].id == "org/name"
        assert [card.id for card in client.models.list().data] == ["org/name", "short"]
        answer = client.completions.create(model="org/name", prompt="x")
        assert client.completions.create(model="short", prompt="x").model == "org/name"
        with pytest.raises(openai.NotFoundError, match="'org/name', 'short' is served"):
            client.completions.create(model="other", prompt="x")
    assert answer.model == "org/name"
    assert httpx.get(f"{server.url}/v1/models/org/name").status_code == 200


def test_tokens_come_back_as_the_text(http: httpx.Client) -> None:
    body = {"prompt": "Once upon", "return_token_strs": True}
    tokens = http.post("/tokenize", json=body).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    bare = http.post("/tokenize", json={"prompt": "Once upon", "add_special_tokens": False})
    text = http.post("/detokenize", json={"tokens": bare.json()["tokens"]}).json()["prompt"]
    assert text == "Once upon"


def test_the_version_and_the_root_are_told(http: httpx.Client) -> None:
    assert http.get("/version").json() == {"version": __version__}
    assert 'href="docs"' in http.get("/").text
    assert "/v1/chat/completions" in http.get("/openapi.json").json()["paths"]


def test_the_prefix_cache_is_reset_unless_it_is_in_use(start_server: Any) -> None:
    server = start_server()
    url = f"{server.url}/reset_prefix_cache"
    assert httpx.post(url, json={}).status_code == 200
    server.engine.has_used_blocks = True
    refused = httpx.post(url, headers={"Content-Type": "application/json"})
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "prefix_cache_in_use"


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_load_balancers_may_probe_by_head(start_server: Any, path: str) -> None:
    server = start_server()
    for method in ("GET", "HEAD"):
        response = httpx.request(method, server.url + path)
        assert response.status_code == 200
        assert bool(response.content) == (method == "GET")
    server.engine.is_dead = True
    assert httpx.head(server.url + path).status_code == 503


def test_a_request_id_is_honoured_or_made(start_server: Any) -> None:
    server = start_server()
    url, body = f"{server.url}/v1/completions", {"prompt": "x"}
    same = [httpx.post(url, json=body, headers={"X-Request-Id": "abc"}) for _ in range(2)]
    assert [answer.headers["x-request-id"] for answer in same] == ["abc", "abc"]
    assert [answer.json()["id"] for answer in same] == ["cmpl-abc", "cmpl-abc"]
    made = httpx.post(url, json=body, headers={"X-Request-Id": "two words"})
    assert " " not in made.headers["x-request-id"]
    named = httpx.post(url, json={**body, "request_id": "mine"})
    assert named.json()["id"] == "cmpl-mine"
    engine_ids = [name for name, *_ in server.engine.requests]
    assert len(set(engine_ids)) == 4
    assert httpx.get(f"{server.url}/nothing").headers["x-request-id"]


def test_all_fields_reach_the_engine(start_server: Any) -> None:
    server = start_server(allow_priority="all")
    fields = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "seed": 3,
        "stop_token_ids": (9,),
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "max_tokens": 5,
        "min_tokens": 2,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
        "prefix_caching": "on",
    }
    converted = {
        "stop": "END",
        "logit_bias": {"65": -1},
        "allowed_token_ids": [65, 66],
        "bad_words": ["no"],
    }
    body = {
        "prompt": "x",
        **fields,
        **converted,
        "stop_token_ids": [9],
        "priority": -3,
        "cache_salt": "s",
    }
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert response.status_code == 200, response.text
    [(_, params, priority, salt)] = server.engine.requests
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.stop == ("END",)
    assert params.logit_bias == {65: -1.0}
    assert params.allowed_token_ids == (65, 66)
    assert params.bad_words == ("no",)
    assert (priority, salt) == (-3, "s")


def test_the_models_defaults_give_way_to_the_request(start_server: Any) -> None:
    server = start_server()
    server.engine.default_sampling_params = {"temperature": 0.6, "top_k": 20, "unknown": 1}
    messages = [{"role": "user", "content": "x"}]
    body = {"messages": messages, "top_k": 5, "max_completion_tokens": 3, "max_tokens": 9}
    httpx.post(f"{server.url}/v1/chat/completions", json=body)
    httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages})
    httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "temperature": 0})
    first, second, third = [params for _, params, *_ in server.engine.requests]
    assert (first.temperature, first.top_k, first.max_tokens) == (0.6, 5, 3)
    assert (second.top_k, second.max_tokens) == (20, None)
    assert (third.temperature, third.max_tokens) == (0, 16)


def test_a_request_may_stay_out_of_the_prefix_cache(start_server: Any) -> None:
    server = start_server()
    for field in ({"skip_reading_prefix_cache": True}, {"prefix_caching": "off"}):
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", **field})
    assert [params.prefix_caching for _, params, *_ in server.engine.requests] == ["off", "off"]


def test_metrics_count_exchanges_by_route_and_requests_by_reason(start_server: Any) -> None:
    server = start_server()
    with httpx.Client(base_url=server.url) as http:
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4})
        http.post("/v1/completions", json={"prompt": "x", "max_tokens": 30, "stream": True})
        http.post("/v1/completions", json={"prompt": ""})
        http.get("/v1/models/fake")
        for path in ("/a", "/b", "/c"):
            http.get(path)
        text = http.get("/metrics").text
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def http_count(handler: str, method: str, status: str) -> float:
        labels = [("handler", handler), ("method", method), ("status", status)]
        return values[("http_requests_total", *labels)]

    assert http_count("/v1/completions", "POST", "2xx") == 2
    assert http_count("/v1/completions", "POST", "4xx") == 1
    assert http_count("/v1/models/{model_id:path}", "GET", "2xx") == 1
    assert http_count("none", "GET", "4xx") == 3
    for prefix in ("vllm:", "octavo:"):
        common = (("engine", "0"), ("finished_reason", "length"), ("model_name", "fake"))
        assert values[(f"{prefix}request_success_total", *common)] == 1
        tokens = "vllm:request_generation_tokens_sum"
        assert values[(tokens, ("engine", "0"), ("model_name", "fake"))] == 24
