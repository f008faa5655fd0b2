"""API keys guard every route but health and readiness, and name the tenant of the cache."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from starlette.routing import Route

from octavo.server.auth import tenant_salt

KEYS = ("first-key", "second-key")


def routes_of(server: Any) -> list[tuple[str, str]]:
    """Every (method, path) of the app, with something in place of parameters."""
    app = server.server.config.app
    found = [(m, r.path) for r in app.routes if isinstance(r, Route) for m in r.methods or ()]
    for path, methods in app.openapi()["paths"].items():
        found += [(method.upper(), path.replace("{model_id}", "fake")) for method in methods]
    return [*found, ("GET", "/")]


def test_every_route_but_health_asks_for_a_key(start_server: Any) -> None:
    server = start_server(api_key=KEYS)
    routes = routes_of(server)
    assert ("POST", "/v1/chat/completions") in routes
    assert ("GET", "/metrics") in routes
    assert ("GET", "/docs") in routes
    assert ("GET", "/v1/models/fake") in routes
    with httpx.Client(base_url=server.url) as http:
        for method, path in [*routes, ("GET", "/unknown"), ("POST", "/v1/unknown")]:
            response = http.request(method, path)
            if path in ("/health", "/ready"):
                assert response.status_code == 200
            else:
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert response.json()["error"]["code"] == "invalid_api_key"


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
    victim = tenant_salt("victim", "")
    for guess in ("", "victim", victim):
        assert tenant_salt("attacker", guess) != victim
    assert tenant_salt("", "plain") == "plain"


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
