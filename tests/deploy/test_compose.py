"""compose.yaml: valid as Compose files are, and true of the servers, files and rules it joins."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from octavo.cli.commands import build_parser
from tests.deploy.arguments import check_arguments

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\$\{(\w+)\}")


def variables() -> dict[str, str]:
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def filled(text: str, **changed: str) -> str:
    """Compose's text with its variables filled in, as Compose would."""
    values = variables() | changed
    return VARIABLE.sub(lambda found: values[found[1]], text)


def composed() -> dict[str, Any]:
    return yaml.safe_load(filled((ROOT / "compose.yaml").read_text(encoding="utf-8")))


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Host's paths by their place in the container."""
    parts = [one.split(":") for one in service["volumes"]]
    return {part[1]: ROOT / part[0] for part in parts if part[0].startswith(".")}


def on_host(service: dict[str, Any], path: str) -> Path:
    """The host's file that a container finds at `path`."""
    for place, source in mounts(service).items():
        if path == place or path.startswith(f"{place}/"):
            return source / path.removeprefix(place).lstrip("/")
    raise AssertionError(f"nothing is mounted at {path}")


@pytest.mark.parametrize("name", ["compose.yaml", "deploy/compose.cuda.yaml"])
def test_compose_takes_the_files(name: str) -> None:
    text = filled((ROOT / name).read_text(encoding="utf-8"))
    PyCompose.from_yaml(text).validate()
    with pytest.raises(ValueError, match="extension key"):
        PyCompose.from_yaml(text.replace("services:\n  octavo:", "services:\n  octavo:\n    x: 1"))


def test_one_file_has_all_variables_and_no_others() -> None:
    used = set(VARIABLE.findall((ROOT / "compose.yaml").read_text(encoding="utf-8")))
    assert used == set(variables()) - {"COMPOSE_FILE"}
    assert variables()["COMPOSE_FILE"] == "compose.yaml"
    text = (ROOT / ".env").read_text(encoding="utf-8")
    (both,) = re.findall(r"COMPOSE_FILE=(\S+:\S+)", text)
    assert all((ROOT / one).exists() for one in both.split(":"))


def test_the_server_knows_its_options_and_has_time_to_drain() -> None:
    octavo = composed()["services"]["octavo"]
    args = check_arguments(shlex.split(octavo["command"]))
    assert octavo["ports"] == [f"127.0.0.1:8000:{args.port}"]
    assert int(octavo["stop_grace_period"].removesuffix("s")) >= args.shutdown_timeout + 20
    assert octavo["read_only"]
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    more = yaml.safe_load(filled(text, OCTAVO_ARGS="--max-model-len 4K -tp 2"))
    other = check_arguments(shlex.split(more["services"]["octavo"]["command"]))
    assert (other.max_model_len, other.tensor_parallel_size) == (4096, 2)


def test_the_image_has_what_the_command_needs() -> None:
    octavo = composed()["services"]["octavo"]
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for name, value in octavo["build"]["args"].items():
        assert re.search(rf"^ARG {name}\b", dockerfile, re.MULTILINE)
        assert re.search(rf"^FROM \S+ AS {value}$", dockerfile, re.MULTILINE)
    (extras,) = re.findall(r"^ARG EXTRAS=(\S+)$", dockerfile, re.MULTILINE)
    assert "otel" in extras.split(",")
    volumes = set(re.findall(r"^VOLUME (\S+)$", dockerfile, re.MULTILINE))
    assert {one.split(":")[1] for one in octavo["volumes"]} == volumes


def test_every_mounted_file_is_there() -> None:
    for service in composed()["services"].values():
        if "volumes" in service:
            assert all(path.exists() for path in mounts(service).values())


def test_traces_go_to_jaeger_and_prometheus_scrapes_the_server() -> None:
    services = composed()["services"]
    args = build_parser().parse_checked(shlex.split(services["octavo"]["command"]))
    # 4317 is where OTLP over gRPC is heard, of Jaeger as of every collector.
    assert args.otlp_traces_endpoint == "http://jaeger:4317"
    prometheus = services["prometheus"]
    options = dict(one.removeprefix("--").split("=", 1) for one in prometheus["command"])
    path = on_host(prometheus, options["config.file"])
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    (scraped,) = config["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": [f"octavo:{args.metrics_port}"]}]
    alone = yaml.safe_load((path.parent / "prometheus.yml").read_text(encoding="utf-8"))
    assert {**config, "scrape_configs": None} == {**alone, "scrape_configs": None}
    assert all((path.parent / name).exists() for name in config["rule_files"])
    assert options["storage.tsdb.path"] in {one.split(":")[1] for one in prometheus["volumes"]}


def test_grafana_is_provided_with_its_sources_and_every_dashboard() -> None:
    services = composed()["services"]
    grafana = services["grafana"]
    root = on_host(grafana, "/etc/grafana/provisioning")
    sources = yaml.safe_load((root / "datasources" / "octavo.yml").read_text(encoding="utf-8"))
    ports = {name: {one.split(":")[-1] for one in services[name]["ports"]} for name in services}
    for source in sources["datasources"]:
        _, host, port = source["url"].replace("//", "").split(":")
        assert host == source["type"]
        assert port in ports[host]
    assert [one["name"] for one in sources["datasources"] if one.get("isDefault")] == ["Prometheus"]
    provided = yaml.safe_load((root / "dashboards" / "octavo.yml").read_text(encoding="utf-8"))
    (provider,) = provided["providers"]
    folder = provider["options"]["path"]
    dashboards = {path.name for path in (ROOT / "deploy" / "grafana").glob("*.json")}
    assert dashboards
    for name in dashboards:
        assert on_host(grafana, f"{folder}/{name}").exists()
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert on_host(grafana, home).exists()


def test_only_the_server_may_be_reached_from_elsewhere() -> None:
    for name, service in composed()["services"].items():
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), name
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    opened = yaml.safe_load(filled(text, OCTAVO_ADDRESS="0.0.0.0"))["services"]
    wide = [name for name in opened if not opened[name]["ports"][0].startswith("127.0.0.1:")]
    assert wide == ["octavo"]
