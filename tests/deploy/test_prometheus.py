"""Rules and dashboards: every name in them is found by a real Prometheus that scrapes a server."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from octavo.observe.metrics import Metrics
from octavo.observe.stats import EngineStats
from tests.deploy.live_server import live_server, load_on

ROOT = Path(__file__).resolve().parents[2] / "deploy"
RULES = [ROOT / "prometheus" / name for name in ("recording.yml", "alerts.yml")]
NAME = re.compile(
    r"\b(?:(?:model|instance):octavo_[a-z0-9_:]+|(?:vllm|octavo):[a-z0-9_]+|http_requests[a-z_]*)"
)
SECONDS = 60.0


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((ROOT / "grafana" / "octavo.json").read_text(encoding="utf-8"))
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every query of the dashboard, as Grafana would send it."""
    found = [target["expr"] for panel in panels() for target in panel["targets"]]
    values = {"$__rate_interval": "1m", "$model": ".*", "$instance": ".*"}
    for variable, value in values.items():
        found = [one.replace(variable, value) for one in found]
    return found


def names() -> set[str]:
    """Every name of a series in rules and dashboard."""
    rules = "\n".join(path.read_text(encoding="utf-8") for path in RULES)
    asked = [line for line in rules.splitlines() if not re.match(r"\s*(summary|runbook):", line)]
    return set(NAME.findall("\n".join([*asked, *expressions()])))


def test_every_alert_says_what_to_do() -> None:
    text = RULES[1].read_text(encoding="utf-8")
    alerts = text.split("- alert:")[1:]
    assert len(alerts) > 8
    for alert in alerts:
        assert re.search(r'^\s+runbook: ".{30,}"$', alert, re.MULTILINE), alert.splitlines()[0]
        assert re.search(r'^\s+summary: ".{10,}"$', alert, re.MULTILINE), alert.splitlines()[0]
        assert re.search(r"severity: (critical|warning|info)\}", alert), alert.splitlines()[0]


def test_the_dashboard_asks_the_data_source_that_is_chosen_and_panels_do_not_overlap() -> None:
    places: set[tuple[int, int]] = set()
    ids = [panel["id"] for panel in panels()]
    assert len(ids) == len(set(ids)) > 15
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, panel["title"]
        places |= cells


def test_the_metrics_of_datadogs_check_are_those_of_a_server() -> None:
    page = (ROOT.parent / "docs" / "observability.md").read_text(encoding="utf-8")
    block = page.partition("openmetrics_endpoint")[2].partition("```")[0]
    wanted = set(re.findall(r"^ +- ([a-z0-9_:]+): [a-z_.]+$", block, re.MULTILINE))
    metrics = Metrics("m", 100)
    metrics.observe_http("/x", "GET", 200, 0.1)
    told = metrics.render(EngineStats()).decode()
    # Datadog's check reads names of counters without their ending.
    families = {one.removesuffix("_total") for one in re.findall(r"^# TYPE (\S+)", told, re.M)}
    assert len(wanted) > 10
    assert wanted <= families


@contextlib.contextmanager
def prometheus(program: str, folder: Path, target: str) -> Iterator[httpx.Client]:
    """Runs it with our own configuration, on this target and faster."""
    text = (ROOT / "prometheus" / "prometheus.yml").read_text(encoding="utf-8")
    config = text.replace("10s", "1s").replace("127.0.0.1:8000", target)
    assert target in config
    (folder / "prometheus.yml").write_text(config)
    for path in RULES:
        (folder / path.name).write_text(path.read_text(encoding="utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        (
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=20) as client:
            yield client
    finally:
        process.terminate()
        process.wait(20)


def until(is_so: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


@pytest.mark.slow
def test_promtool_takes_configuration_and_rules(
    debian_program: Callable[[str, str], str],
) -> None:
    promtool = debian_program("promtool", "prometheus")
    configs = [("config", ROOT / "prometheus" / name) for name in ("prometheus.yml", "compose.yml")]
    for command in (*configs, ("rules", *RULES)):
        checked = subprocess.run(
            (promtool, "check", *map(str, command)), capture_output=True, text=True, timeout=60
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert "SUCCESS" in checked.stdout


@pytest.mark.slow
def test_a_real_prometheus_finds_every_name(
    debian_program: Callable[[str, str], str], tmp_path: Path
) -> None:
    program = debian_program("prometheus", "prometheus")
    wanted = names()
    assert len(wanted) > 40
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(live_server(tmp_path))
        stack.enter_context(load_on(server.url))
        target = server.metrics_url.removeprefix("http://")
        client = stack.enter_context(prometheus(program, tmp_path, target))
        missing = set(wanted)

        def all_are_there() -> bool:
            try:
                answer = client.get("/label/__name__/values")
            except httpx.HTTPError:
                return False  # it starts
            if answer.status_code == 503:
                return False  # it is not ready
            missing.difference_update(answer.json()["data"])
            return not missing

        # Some come with the second evaluation of what the first one recorded.
        with contextlib.suppress(AssertionError):
            until(all_are_there, "")
        assert not missing
        for one in expressions():
            answer = client.get("/query", params={"query": one})
            assert answer.status_code == 200, (one, answer.text)
        tokens = "model:octavo_generation_tokens:rate1m > 0"
        until(
            lambda: client.get("/query", params={"query": tokens}).json()["data"]["result"],
            "no rate of tokens was recorded",
        )
        groups = client.get("/rules").json()["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        assert {rule["health"] for rule in rules} == {"ok"}, [
            rule.get("lastError") for rule in rules
        ]
