"""The HTTP application: routes, and the middlewares around them.

Made by `serve` and by tests with `create_app`; never binds a port.

A request passes, from the outside: access (id, metrics, log), traces, CORS, drain, keys, routes.
"""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from octavo import __version__
from octavo.config import ServerConfig
from octavo.engine.chat_template import ChatRenderer
from octavo.errors import RequestError
from octavo.observe.metrics import Metrics
from octavo.server import errors, openapi
from octavo.server.access import AccessMiddleware
from octavo.server.audit import AuditLog
from octavo.server.auth import AuthMiddleware
from octavo.server.direct_routes import App
from octavo.server.docs_page import add_docs
from octavo.server.drain import Drain, DrainMiddleware
from octavo.server.engine_client import Engine
from octavo.server.guards.load import new_gate
from octavo.server.limits import BodyRoom, default_body_bytes
from octavo.server.parser import ParserProcess
from octavo.server.protocol.batches import ENDPOINTS
from octavo.server.routes import (
    batches,
    chat,
    completions,
    embeddings,
    explaining,
    files,
    health,
    live,
    messages,
    operation,
    rendering,
    responses,
    sagemaker,
    scores,
    stored_responses,
    tokens,
)
from octavo.server.state import Handler, ServerState, Siblings, no_siblings
from octavo.server.store.store import Store
from octavo.server.stored_responses import Responses
from octavo.server.tenants.budgets import Budgets
from octavo.server.tenants.counts import SharedCounts
from octavo.server.tenants.keyring import Keyring
from octavo.server.tenants.route_scopes import RouteScopes, check, paths_of
from octavo.server.tokenising import Tokenising
from octavo.server.tracing.middleware import TraceMiddleware, Tracer

FAMILIES: tuple[Any, ...] = (
    *(chat, completions, messages, responses, stored_responses),
    *(embeddings, scores, files, batches),
    *(rendering, explaining, sagemaker, tokens, operation, health, live),
)
"""Modules of routes."""


def create_app(
    engine: Engine,
    config: ServerConfig,
    siblings: Siblings | None = None,
    tracer: Tracer | None = None,
    counts: SharedCounts | None = None,
) -> FastAPI:
    """Returns the application that serves `engine`; its ServerState is `app.state.server`. With a
    `tracer`, requests are traced; `counts` are shared with its siblings."""
    names = config.served_model_name or (engine.model_name,)
    metrics = Metrics(names[0], engine.max_model_len)
    drain = Drain()
    store = Store(config)
    budgets = Budgets(counts or SharedCounts())
    guard = new_gate(config, engine)
    if guard is not None:
        metrics.watch_guard(guard)
    keyring, route_scopes = Keyring(config), RouteScopes(config.public_metrics)
    audit = _audit_log(config, names[0], route_scopes)
    if audit is not None:
        metrics.watch_audit(lambda: audit.counts)
    access = Middleware(
        AccessMiddleware,
        metrics=metrics,
        silent=config.disable_access_log_for_endpoints,
        audit=audit,
    )
    traces = [] if tracer is None else [Middleware(TraceMiddleware, tracer=tracer)]
    keys = Middleware(AuthMiddleware, keyring=keyring, route_scopes=route_scopes, budgets=budgets)
    middleware = [access, *traces, *_cors(config), Middleware(DrainMiddleware, drain=drain), keys]
    app = App(
        middleware,
        prefix=config.root_path,
        direct=(chat.router, completions.router, messages.router, responses.router),
        title="Octavo",
        version=__version__,
        redirect_slashes=False,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.server = ServerState(
        engine=engine,
        config=config,
        metrics=metrics,
        model_names=names,
        started_at=int(time.time()),
        drain=drain,
        siblings=siblings or no_siblings,
        tokenising=Tokenising(engine),
        body_room=BodyRoom(config.max_body_bytes or default_body_bytes(engine.max_model_len)),
        # A guard sees messages before they are rendered.
        parser=ParserProcess(lambda: _renderer(engine) if guard is None else None),
        store=store,
        keyring=keyring,
        budgets=budgets,
        guard=guard,
        audit=audit,
        responses=Responses(store),
        batch_handlers=_batch_handlers(FAMILIES),
    )
    errors.install(app)
    for family in FAMILIES:
        app.include_router(family.router)
    openapi.install(app, app.state.server)
    add_docs(app)
    check(paths_of(app, [family.router for family in FAMILIES]))
    return app


def _audit_log(config: ServerConfig, model: str, routes: RouteScopes) -> AuditLog | None:
    if config.audit_log is None:
        return None
    return AuditLog(config.audit_log, model, routes, config.audit_log_text)


def _cors(config: ServerConfig) -> list[Middleware]:
    """Returns what lets pages of other origins in, if some may."""
    if not config.allowed_origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    ]


def _batch_handlers(families: tuple[Any, ...]) -> dict[str, Handler]:
    """Returns the functions of the routes that lines of batches may be for."""
    routes = {
        route.path: route.endpoint
        for family in families
        for route in family.router.routes
        if "POST" in route.methods
    }
    return {path: routes[path] for path in ENDPOINTS if path in routes}


def _renderer(engine: Engine) -> ChatRenderer | None:
    """Returns what renders chats, if the model has a tokenizer and a template."""
    try:
        return engine.tokenizer.chat_renderer
    except RequestError:
        return None
