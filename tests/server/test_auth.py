"""API keys guard every route but health and readiness, and name the tenant of the cache."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.routing import Route

from octavo.server.tenants.callers import NOBODY, named_secret, plain_tenant

MESSAGES = "/v1/messages"
KEYS = ("first-key", "second-key")
OPERATOR = "third-key"
OPERATIONS = [("GET", "/metrics"), ("POST", "/reset_prefix_cache")]
USER = [{"role": "user", "content": "x"}]
JSON = {"Content-Type": "application/json"}


def bearer(key: str | bytes) -> dict[str, str | bytes]:
    raw = key.encode() if isinstance(key, str) else key
    return {**JSON, "Authorization": b"Bearer " + raw}


def ask(server: Any, method: str, path: str, **headers: Any) -> httpx.Response:
    return httpx.request(method, server.url + path, headers=headers)


def routes_of(server: Any) -> list[tuple[str, str]]:
    """Every (method, path) of the app, with something in place of parameters."""
    app = server.server.config.app
    found = [(m, r.path) for r in app.routes if isinstance(r, Route) for m in r.methods or ()]
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path.replace("{model_id}", "fake")) for method in methods]
    return [*found, *(("GET", path) for path in ("/", "/live", "/live.css", "/live.js"))]


def test_a_key_is_taken_in_anthropics_header_where_there_is_no_bearer(start_server: Any) -> None:
    url = start_server(api_key=KEYS).url + "/v1/models"
    assert httpx.get(url, headers={"x-api-key": KEYS[0]}).status_code == 200
    assert httpx.get(url, headers={"x-api-key": "other"}).status_code == 401
    both = {"x-api-key": KEYS[0], "Authorization": "Bearer other"}
    assert httpx.get(url, headers=both).status_code == 401


@pytest.mark.parametrize("name", ["Authorization", "x-api-key"])
def test_two_keys_in_one_header_are_refused(start_server: Any, name: str) -> None:
    start = "Bearer " if name == "Authorization" else ""
    good, bad = (name, start + KEYS[0]), (name.lower(), start + "other")
    url = start_server(api_key=KEYS).url + "/v1/models"
    for headers in ([good, bad], [bad, good]):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "ambiguous_key"
    assert httpx.get(url, headers=[good, good]).status_code == 200


def test_every_route_but_health_and_the_bare_page_asks_for_a_key(start_server: Any) -> None:
    server = start_server(api_key=KEYS)
    routes = routes_of(server)
    assert ("POST", "/v1/chat/completions") in routes
    assert ("GET", "/metrics") in routes
    assert ("GET", "/live") in routes
    assert ("GET", "/docs") in routes
    assert ("GET", "/v1/models/fake") in routes
    with httpx.Client(base_url=server.url) as http:
        for method, path in [*routes, ("GET", "/unknown"), ("POST", "/v1/unknown")]:
            response = http.request(method, path)
            if path in ("/health", "/ready", "/ping", "/", "/live.css", "/live.js"):
                assert response.status_code == 200
            else:
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    error = response.json()["error"]
                    assert "send a valid API key" in error["message"]
                    assert path.startswith(MESSAGES) or error["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2"],
)
def test_a_wrong_key_is_refused(start_server: Any, header: str) -> None:
    server = start_server(api_key=KEYS)
    response = httpx.get(f"{server.url}/v1/models", headers={"Authorization": header})
    assert response.status_code == 401
    assert "first-key" not in response.text


@pytest.mark.parametrize(
    "path", ["//health", "/health/", "/health/../metrics", "/HEALTH", "/ready/x"]
)
def test_a_path_that_looks_like_health_is_guarded(start_server: Any, path: str) -> None:
    server = start_server(api_key=KEYS)
    request = httpx.Request("GET", httpx.URL(server.url).copy_with(raw_path=path.encode()))
    with httpx.Client() as http:
        assert http.send(request).status_code == 401


def test_every_key_is_let_in_and_has_its_own_salt(start_server: Any) -> None:
    server = start_server(api_key=KEYS)
    for key in KEYS:
        for salt in ({}, {"cache_salt": "mine"}):
            response = httpx.post(
                f"{server.url}/v1/completions",
                json={"prompt": "x", **salt},
                headers={"Authorization": f"Bearer {key}"},
            )
            assert response.status_code == 200
    salts = [salt for *_, salt in server.engine.requests]
    assert len(set(salts)) == 4
    assert all(salts)
    assert not any(key in salt for salt in salts for key in KEYS)


def test_no_client_salt_reaches_the_salt_of_another_key() -> None:
    victim = plain_tenant("victim").salt("")
    for guess in ("", "victim", victim):
        assert plain_tenant("attacker").salt(guess) != victim
    assert NOBODY.salt("plain") == "plain"
    assert len({named_secret(name) for name in ("a", "a\0", "b")}) == 3


def test_a_browser_of_an_allowed_origin_may_ask_first(start_server: Any) -> None:
    server = start_server(api_key=KEYS, allowed_origins=("http://ui.example",))
    ask = {
        "Origin": "http://ui.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    response = httpx.options(f"{server.url}/v1/completions", headers=ask)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://ui.example"
    other = httpx.options(
        f"{server.url}/v1/completions", headers={**ask, "Origin": "http://evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    refused = httpx.post(f"{server.url}/v1/completions", headers={"Origin": "http://ui.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "http://ui.example"


def test_a_browser_is_not_let_in_by_default(start_server: Any) -> None:
    server = start_server()
    response = httpx.get(f"{server.url}/v1/models", headers={"Origin": "http://ui.example"})
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_tells_of_other_tenants_is_the_operators(
    start_server: Any, method: str, path: str
) -> None:
    server = start_server(api_key=KEYS, operator_key=(OPERATOR,))
    assert ask(server, method, path, **JSON).status_code == 401
    assert ask(server, method, path, **bearer(OPERATOR)).status_code == 200
    refused = ask(server, method, path, **bearer(KEYS[0]))
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "operator_only"
    assert "--operator-key" in refused.json()["error"]["message"]
    assert ask(server, "GET", "/v1/models", **bearer(OPERATOR)).status_code == 200


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_without_an_operators_key_nobody_is_the_operator_but_without_any_everyone(
    start_server: Any, method: str, path: str
) -> None:
    assert ask(start_server(api_key=KEYS), method, path, **bearer(KEYS[0])).status_code == 403
    assert ask(start_server(), method, path, **JSON).status_code == 200


def test_an_operators_key_alone_closes_the_server_to_all_others(start_server: Any) -> None:
    server = start_server(operator_key=(OPERATOR,))
    assert ask(server, "GET", "/v1/models").status_code == 401
    assert ask(server, "GET", "/v1/models", **bearer(OPERATOR)).status_code == 200


def test_scrapers_may_be_let_in_without_a_key(start_server: Any) -> None:
    server = start_server(api_key=KEYS, public_metrics=True)
    for path in ("/metrics", "/version", "/health", "/ready"):
        assert ask(server, "GET", path).status_code == 200, path
    assert ask(server, "GET", "/v1/models").status_code == 401
    assert ask(server, "POST", "/reset_prefix_cache", **JSON).status_code == 401


@pytest.mark.parametrize("spelling", ["utf-8", "latin-1"])
def test_a_key_outside_ascii_is_one_tenant_however_it_is_sent(
    start_server: Any, spelling: str
) -> None:
    key = "cl\u00e9-secr\u00e8te"
    server = start_server(api_key=(key,))
    assert ask(server, "GET", "/v1/models", **bearer(key.encode(spelling))).status_code == 200
    assert ask(server, "GET", "/v1/models", **bearer("cl-secrte")).status_code == 401
    httpx.post(
        f"{server.url}/v1/completions",
        content='{"prompt": "x"}',
        headers=bearer(key.encode(spelling)),
    )
    assert [salt for *_, salt in server.engine.requests] == [plain_tenant(key).salt("")]


def test_a_key_of_signs_that_latin_1_has_not_works(start_server: Any) -> None:
    key = "\u9375-\U0001f511"
    server = start_server(api_key=(key,))
    assert ask(server, "GET", "/v1/models", **bearer(key)).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_who_may_pass_others_by_is_the_operators_choice(start_server: Any, path: str) -> None:
    def status(server: Any, priority: int, **headers: Any) -> int:
        body: dict[str, Any] = {"priority": priority, "max_tokens": 1}
        body |= {"prompt": "x"} if path == "/v1/completions" else {"messages": USER}
        response = httpx.post(server.url + path, json=body, headers=headers)
        if response.status_code != 200:
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("priority", "priority_not_allowed")
            assert "--allow-priority" in error["message"]
        return response.status_code

    closed = start_server(api_key=KEYS, operator_key=(OPERATOR,))
    assert [status(closed, p, **bearer(KEYS[0])) for p in (0, 1, -1)] == [200, 400, 400]
    assert [status(closed, p, **bearer(OPERATOR)) for p in (0, 1, -1)] == [200, 200, 200]
    assert [status(start_server(), p) for p in (0, 1, -1)] == [200, 400, 400]
    ranged = start_server(allow_priority="-2..10")
    assert [status(ranged, p) for p in (-3, -2, 10, 11)] == [400, 200, 200, 400]
    assert status(start_server(allow_priority="all"), 2**31 - 1) == 200


def test_no_form_of_another_site_can_reset_the_cache(start_server: Any) -> None:
    server = start_server()
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        headers = {"Content-Type": content_type} if content_type else {}
        assert ask(server, "POST", "/reset_prefix_cache", **headers).status_code == 400


def test_keys_are_never_logged(start_server: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server = start_server(api_key=KEYS, operator_key=(OPERATOR,))
    for key in (*KEYS, OPERATOR, "wrong-key"):
        for method, path in (*OPERATIONS, ("GET", "/v1/models"), ("POST", "/v1/completions")):
            ask(server, method, path, **bearer(key))
    # Not what the test's own client logs.
    text = "".join(str(vars(one)) for one in caplog.records if not one.name.startswith("http"))
    assert "/v1/models" in text
    assert not any(key in text for key in (*KEYS, OPERATOR, "wrong-key"))
