"""What the container and Kubernetes files promise: fixed versions, nobody as root, limits, probes, no secret inside."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SECRET = re.compile(r"(?i)(secret|password|token|access_key)")


def _kubernetes() -> list[dict[str, Any]]:
    files = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    found = {path.name for path in (INFRA / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(files) == found, "kustomization.yaml names every file, and no other"
    return [one for name in files for one in yaml.safe_load_all((INFRA / "kubernetes" / name).read_text())]


RESOURCES = _kubernetes()
PODS = {
    f"{one['kind']}/{one['metadata']['name']}": one["spec"]["template"]["spec"]
    for one in RESOURCES
    if "template" in one.get("spec", {})
}
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS.keys())
def test_pods_are_unprivileged_limited_and_probed(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
    assert pod["automountServiceAccountToken"] is False
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    for container in pod["containers"]:
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        ports = {port["name"] for port in container["ports"]}
        assert {container[kind]["httpGet"]["port"] for kind in ("readinessProbe", "livenessProbe")} <= ports


def test_mounted_volumes_exist() -> None:
    claims = {one["metadata"]["name"] for one in RESOURCES if one["kind"] == "PersistentVolumeClaim"}
    for one in RESOURCES:
        if "template" not in one.get("spec", {}):
            continue
        pod = one["spec"]["template"]["spec"]
        templates = {claim["metadata"]["name"] for claim in one["spec"].get("volumeClaimTemplates", [])}
        names = {volume["name"] for volume in pod["volumes"]} | templates
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= names
        used = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        assert used <= claims


def test_services_reach_pods() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in RESOURCES if "template" in one.get("spec", {})]
    for one in RESOURCES:
        if one["kind"] == "Service":
            assert one["spec"]["selector"] in labels


@pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES.keys())
def test_compose_services_are_locked_down_and_limited(service: dict[str, Any]) -> None:
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory"}
    assert "healthcheck" in service or service["restart"] == "no"
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_images_have_the_version_of_the_package() -> None:
    images = {service["image"] for service in SERVICES.values()}
    images |= {c["image"] for pod in PODS.values() for c in [*pod.get("initContainers", []), *pod["containers"]]}
    targets = re.findall(r"AS (\w+)", (INFRA / "Dockerfile").read_text())
    assert images == {f"geostream-{target}:{VERSION}" for target in targets if target != "base"}
    [base] = re.findall(r"^FROM (\S+:\S+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)


def test_no_secret_is_written_down() -> None:
    """Whatever is named like one is taken from the user's environment, or from a Kubernetes secret."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    for pod in PODS.values():
        for container in pod["containers"]:
            for entry in container.get("env", []):
                assert "secretKeyRef" in entry["valueFrom"]
    assert not [one for one in RESOURCES if one["kind"] == "Secret"]
    settings = next(one for one in RESOURCES if one["kind"] == "ConfigMap")["data"]
    assert not [name for name in settings if SECRET.search(name)]
    assert "ENV AWS_" not in (INFRA / "Dockerfile").read_text()


def test_every_folder_that_the_image_copies_passes_the_ignore_file() -> None:
    allowed = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = re.findall(r"^COPY (.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert source in allowed and list(ROOT.glob(source)), source
