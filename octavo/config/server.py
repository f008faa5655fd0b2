"""Every option of the HTTP server, with default, type and meaning.

The CLI, the docs and the checks are made from the dataclass; a test pins the list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Literal

from octavo.config.environment import environment_keys
from octavo.config.fields import check_positive, check_seconds, option, values_of
from octavo.errors import ConfigError
from octavo.plain_keys import all_keys
from octavo.request_limits import MAX_INT
from octavo.traces_config import check_traces


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """All options of the HTTP server."""

    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_key: tuple[str, ...] = option(
        (), "keys that are let in (also OCTAVO_API_KEY)", is_secret=True
    )
    api_key_file: str | None = option(None, "file of keys that are let in, one a line")
    operator_key: tuple[str, ...] = option(
        (),
        "keys that may also read metrics and reset the cache (also OCTAVO_OPERATOR_KEY)",
        is_secret=True,
    )
    operator_key_file: str | None = option(None, "file of operator keys, one a line")
    keys: str | None = option(
        None, "file of keys (their hashes), tenants with limits, and issuers of tokens"
    )
    public_metrics: bool = option(False, "answer /metrics and /version without a key")
    metrics_port: int | None = option(
        None, "second port that answers /metrics, /health and /ready alone, in plain HTTP, no key"
    )
    expert_metrics: bool = option(
        False, "tell in /metrics of every expert of every layer, which are thousands of series"
    )
    otlp_traces_endpoint: str | None = option(
        None, "collector of OpenTelemetry traces, like http://localhost:4317; extra otel"
    )
    otlp_traces_protocol: str = option(
        "auto",
        "how traces travel; auto is http for port 4318 and paths, else grpc",
        choices=("auto", "grpc", "http"),
    )
    otlp_traces_sampling: float = option(
        1.0, "share of requests that are traced, if their traceparent does not say"
    )
    allow_priority: str = option(
        "0..0", "priorities that clients may ask for, like -10..10, or all; operators may always"
    )
    served_model_name: tuple[str, ...] = option((), "names of the model in the API")
    api_processes: int = option(
        1, "processes that speak HTTP, over one engine: for more tokens than one core can send"
    )
    max_body_bytes: int | None = option(
        None, "largest request body; as the context needs if not given, at most 4 MiB"
    )
    max_prompt_tokens: int | None = option(
        None, "longest prompt that is taken; as the context allows if not given", unit="tokens"
    )
    max_messages: int | None = option(None, "most messages of a chat; any number if not given")
    store_dir: str | None = option(
        None,
        "folder of stored responses, files and batches; in the user's data folder if not given",
    )
    max_store_bytes: int = option(
        10 * 2**30, "most bytes of stored responses, files and batches; 0 stores nothing"
    )
    allowed_origins: tuple[str, ...] = option(
        (), "origins that browsers may call from, or a JSON list of them", is_json=True
    )
    ssl_certfile: str | None = option(None, "certificate (PEM, with its chain): serve HTTPS")
    ssl_keyfile: str | None = option(None, "key of the certificate, if not in the same file")
    enable_ssl_refresh: bool = option(
        False, "read the certificate again when its file changes; new connections get it"
    )
    root_path: str = option("", "prefix under which a proxy serves this server, like /llm")
    forwarded_allow_ips: tuple[str, ...] = option(
        (),
        "proxies whose X-Forwarded-For and -Proto are believed: addresses or networks",
        separator=",",
    )
    audit_log: str | None = option(
        None, "file of JSON lines: who asked for what, sizes and decisions; no texts"
    )
    audit_log_text: bool = option(False, "with audit_log: what was sent and told, too")
    guard: str | None = option(
        None, "function that judges texts before the model and before the client, like my.module:f"
    )
    guard_url: str | None = option(None, "the same, asked by HTTP: POST of JSON to this URL")
    guard_stages: str = option("both", "what the guard judges", choices=("both", "input", "output"))
    guard_timeout: float = option(2.0, "seconds that the guard gets for one check")
    guard_fail_open: bool = option(
        False, "let texts through that the guard has not judged in time; else they are refused"
    )
    guard_max_concurrent: int = option(32, "checks that the guard gets at once")
    guard_max_waiting: int = option(1024, "checks that may wait for the guard")
    guard_window: int = option(
        256,
        "characters of a streamed answer that are held back and judged at once; 0: all of it",
    )
    disable_access_log_for_endpoints: tuple[str, ...] = option(
        (), "paths whose requests are not logged, like /health,/metrics", separator=","
    )
    log_format: Literal["text", "json"] = option("text", "log lines", choices=("text", "json"))
    log_level: str = option(
        "info", "least severe log line", choices=("debug", "info", "warning", "error")
    )
    disable_log_stats: bool = option(False, "no line on throughput every ten seconds under load")
    shutdown_timeout: float = option(30.0, "seconds that running requests get at shutdown")
    preemption_notice: str | None = option(
        None,
        "file that appears, or URL that answers, when this machine is about to be taken away: "
        "requests that have not begun are handed back",
    )
    debug_loop_holds: bool = option(
        False, "debug mode: measure how long one callback holds the event loop, log and export it"
    )

    def resolve(self) -> ServerConfig:
        """Returns a copy in its own types, with the keys of files and environment added.

        Raises ConfigError.
        """
        return replace(self, **values_of(self))._resolved()

    def _resolved(self) -> ServerConfig:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}", field="port")
        if self.metrics_port is not None and not 0 <= self.metrics_port <= 65535:
            message = f"metrics_port must be in 0..65535, got {self.metrics_port}"
            raise ConfigError(message, field="metrics_port")
        if self.metrics_port and self.metrics_port == self.port:
            message = f"metrics_port is port, {self.port}; give the metrics another one"
            raise ConfigError(message, field="metrics_port")
        self._check_texts()
        if self.ssl_certfile is None and (self.ssl_keyfile or self.enable_ssl_refresh):
            field = "ssl_keyfile" if self.ssl_keyfile else "enable_ssl_refresh"
            raise ConfigError(f"{field} needs ssl_certfile, the certificate", field=field)
        check_positive("api_processes", self.api_processes)
        for name in ("max_body_bytes", "max_prompt_tokens", "max_messages"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        self._check_proxies()
        self._check_notice()
        if self.max_store_bytes < 0:
            message = f"max_store_bytes must be at least 0, got {self.max_store_bytes}"
            raise ConfigError(message, field="max_store_bytes")
        self._check_guard()
        if self.audit_log_text and self.audit_log is None:
            message = "audit_log_text needs audit_log, the file"
            raise ConfigError(message, field="audit_log_text")
        check_seconds("shutdown_timeout", self.shutdown_timeout)
        check_traces(self.otlp_traces_endpoint, self.otlp_traces_sampling)
        _ = self.priority_range
        keys = {
            name: all_keys(
                name,
                getattr(self, name),
                getattr(self, f"{name}_file"),
                environment_keys(name),
            )
            for name in ("api_key", "operator_key")
        }
        if both := set(keys["api_key"]) & set(keys["operator_key"]):
            message = f"{len(both)} of the api_key are operator_key, too; a key has one role"
            raise ConfigError(message, field="operator_key")
        return replace(self, **keys, api_key_file=None, operator_key_file=None)

    @property
    def has_keys(self) -> bool:
        """Whether somebody needs a key."""
        return bool(self.api_key or self.operator_key or self.keys)

    @property
    def priority_range(self) -> tuple[int, int]:
        """Lowest and highest priority that clients may ask for. Raises ConfigError."""
        if self.allow_priority == "all":
            return -MAX_INT, MAX_INT
        found = re.fullmatch(r"(-?[0-9]{1,10})\.\.(-?[0-9]{1,10})", self.allow_priority)
        low, high = (int(found[1]), int(found[2])) if found else (1, 0)
        if not -MAX_INT <= low <= 0 <= high <= MAX_INT:
            raise ConfigError(
                "allow_priority must be all or a range that holds 0, like -10..10, got "
                f"{self.allow_priority!r}",
                field="allow_priority",
            )
        return low, high

    def _check_proxies(self) -> None:
        if not re.fullmatch(r"((/[\w.~-]+)+)?", self.root_path):
            message = f"root_path must be like /llm, with no / at its end, got {self.root_path!r}"
            raise ConfigError(message, field="root_path")
        for one in self.forwarded_allow_ips:
            # A name, or an address with bits behind its network, would be taken for nobody.
            try:
                ip_network(one)
            except ValueError as error:
                message = f"forwarded_allow_ips must be like 10.0.0.7 or 10.0.0.0/8, got {one!r}"
                raise ConfigError(message, field="forwarded_allow_ips") from error

    def _check_notice(self) -> None:
        notice = self.preemption_notice or ""
        if "://" in notice and not re.match(r"https?://[^/\s]+", notice):
            message = f"preemption_notice must be a file or an http URL, got {notice!r}"
            raise ConfigError(message, field="preemption_notice")

    def _check_guard(self) -> None:
        if self.guard is not None and self.guard_url is not None:
            raise ConfigError("guard and guard_url are both given; keep one", field="guard_url")
        if self.guard is not None and not re.fullmatch(r"[\w.]+:[\w.]+", self.guard):
            message = f"guard must be like my.module:function, got {self.guard!r}"
            raise ConfigError(message, field="guard")
        if self.guard_url is not None and not re.match(r"https?://[^/\s]+", self.guard_url):
            message = f"guard_url must be like http://127.0.0.1:9000/check, got {self.guard_url!r}"
            raise ConfigError(message, field="guard_url")
        check_positive("guard_max_concurrent", self.guard_max_concurrent)
        for name in ("guard_max_waiting", "guard_window"):
            if getattr(self, name) < 0:
                message = f"{name} must be at least 0, got {getattr(self, name)}"
                raise ConfigError(message, field=name)
        check_seconds("guard_timeout", self.guard_timeout)
        if not self.guard_timeout:
            message = "guard_timeout must be above 0 seconds, got 0"
            raise ConfigError(message, field="guard_timeout")

    def _check_texts(self) -> None:
        for name, pattern, wanted in _TEXT_CHECKS:
            for text in getattr(self, name):
                if not re.fullmatch(pattern, text):
                    raise ConfigError(f"{name} must be {wanted}, got {text!r}", field=name)


_TEXT_CHECKS = (
    (
        "allowed_origins",
        r"\*|null|[a-zA-Z][a-zA-Z0-9+.-]*://[^/\s]+",
        "* or origins like https://app.example.com, without a path",
    ),
    ("disable_access_log_for_endpoints", r"/\S*", "paths that begin with /"),
    ("served_model_name", r"(?s).*\S.*", "names that are not empty"),
)
"""Fields that hold texts, the pattern of each text, and its description."""
