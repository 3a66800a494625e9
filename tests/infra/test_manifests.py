"""What the container and Kubernetes files promise: fixed versions, nobody as root, limits, probes, no secret inside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import distributed
import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
SECRET = re.compile(r"(?i)(secret|password|token|access_key)")
KUBERNETES = "1.34"  # whose schemas the manifests are checked by


def _kubernetes() -> list[dict[str, Any]]:
    files = yaml.safe_load((INFRA / "kubernetes" / "kustomization.yaml").read_text())["resources"]
    found = {path.name for path in (INFRA / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(files) == found, "kustomization.yaml names every file, and no other"
    return [one for name in files for one in yaml.safe_load_all((INFRA / "kubernetes" / name).read_text())]


def _flow_run(given: dict[str, Any]) -> dict[str, Any]:
    """The job that the Prefect worker makes of flow-run.json: the defaults of its variables, or what is given."""
    template = json.loads((INFRA / "kubernetes" / "flow-run.json").read_text())
    properties = template["variables"]["properties"]
    assert set(given) <= set(properties)
    values = {name: what["default"] for name, what in properties.items() if "default" in what} | given

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: fill(value) for name, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        if isinstance(node, str) and (whole := re.fullmatch(r"{{ (\w+) }}", node)):
            return values[whole[1]]
        return re.sub(r"{{ (\w+) }}", lambda found: values[found[1]], node) if isinstance(node, str) else node

    job: dict[str, Any] = fill(template["job_configuration"]["job_manifest"])
    return job


RESOURCES = _kubernetes()
JOBS = [
    one
    for path in sorted((INFRA / "kubernetes" / "jobs").glob("*.yaml"))
    for one in yaml.safe_load_all(path.read_text())
]
FLOW_RUN = _flow_run({"name": "run", "command": ["prefect", "flow-run", "execute"], "labels": {"a": "b"}, "gpus": 1})
DASK = next(one for one in RESOURCES if one["kind"] == "DaskCluster")
BY_DASK = {f"DaskCluster/{part}": DASK["spec"][part]["spec"] for part in ("scheduler", "worker")}
RUN_ONCE = {
    f"{one['kind']}/{one['metadata'].get('name', 'train')}": one["spec"]["template"]["spec"]
    for one in [*JOBS, FLOW_RUN]
    if one["kind"] == "Job"
}
LASTING = {
    f"{one['kind']}/{one['metadata']['name']}": one["spec"]["template"]["spec"]
    for one in RESOURCES
    if "template" in one.get("spec", {})
} | BY_DASK
PODS = LASTING | RUN_ONCE
COMPOSE = yaml.safe_load((INFRA / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS.keys())
def test_pods_are_unprivileged_limited_and_probed(pod: dict[str, Any]) -> None:
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"]
    assert pod["automountServiceAccountToken"] is ("serviceAccountName" in pod)
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert {"cpu", "memory"} <= set(container["resources"]["requests"])


@pytest.mark.parametrize("pod", LASTING.values(), ids=LASTING.keys())
def test_pods_that_last_are_probed(pod: dict[str, Any]) -> None:
    for container in pod["containers"]:
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)
        ports = {port["name"] for port in container["ports"]}
        probes = [container[kind] for kind in ("readinessProbe", "livenessProbe")]
        assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= ports


@pytest.mark.parametrize("one", [*RESOURCES, *JOBS, FLOW_RUN], ids=lambda one: one["kind"])
def test_kubernetes_accepts_each_resource(one: dict[str, Any]) -> None:
    if "dask.org" in one["apiVersion"]:
        _operator(one["kind"]).validate(one)
    else:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def _operator(kind: str) -> jsonschema.Draft202012Validator:
    """By the operator's definition of a resource, with the pods and services in it as Kubernetes defines them.

    ``jsonschema.validate`` would check 700 definitions of Kubernetes first, which takes seconds.
    """
    folder = Path(__file__).parent / "crds"
    own = yaml.safe_load((folder / "templates.yaml").read_text())["definitions"]
    crd = yaml.safe_load((folder / f"{kind.lower()}.yaml").read_text())
    of_kubernetes = (
        Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    )
    definitions = json.loads((of_kubernetes / "_definitions.json").read_text())["$defs"]

    def here(node: Any) -> Any:
        """The schema with its references, also those to other files, to the definitions at its end."""
        if isinstance(node, dict):
            return {
                name: re.sub(r".*#/(definitions|\$defs)/", "#/$defs/", value)
                if name == "$ref" and isinstance(value, str)
                else here(value)
                for name, value in node.items()
            }
        return [here(value) for value in node] if isinstance(node, list) else node

    schema: dict[str, Any] = here(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"])
    return jsonschema.Draft202012Validator({**schema, "$defs": here({**definitions, **own})})


def test_the_schema_of_the_operator_refuses_what_is_wrong() -> None:
    wrong = json.loads(json.dumps(DASK))
    wrong["spec"]["worker"]["spec"]["containers"][0]["imgae"] = wrong["spec"]["worker"]["spec"]["containers"][0][
        "image"
    ]
    with pytest.raises(jsonschema.ValidationError, match="imgae"):
        _operator("DaskCluster").validate(wrong)


def test_compose_file_keeps_to_the_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(INFRA / "compose.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_of_dockerfiles_has_nothing_to_say() -> None:
    linter = str(Path(sysconfig.get_path("scripts"), "hadolint"))
    done = subprocess.run([linter, str(INFRA / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kustomize_builds_everything_with_ones_own_registry() -> None:
    command = ["kubectl", "kustomize", str(INFRA / "kubernetes")]
    built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kinds = [one["kind"] for one in yaml.safe_load_all(built)]
    assert len(kinds) == len(RESOURCES) + 1 and kinds.count("DaskCluster") == 1  # and the generated template
    by_kind = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(built)}
    [template] = [name for kind, name in by_kind if kind == "ConfigMap" and name.startswith("flow-run")]
    volumes = by_kind["Deployment", "worker"]["spec"]["template"]["spec"]["volumes"]
    assert {"name": "templates", "configMap": {"name": template}} in volumes


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS.keys())
def test_mounted_volumes_exist(pod: dict[str, Any]) -> None:
    claimed = {
        claim["metadata"]["name"]
        for one in RESOURCES
        if one.get("spec", {}).get("template", {}).get("spec") == pod
        for claim in one["spec"].get("volumeClaimTemplates", [])
    }
    names = {volume["name"] for volume in pod["volumes"]} | claimed
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= names


def test_trainings_and_flow_runs_ask_for_gpus_and_are_left_alone() -> None:
    for one in [*JOBS, FLOW_RUN]:
        if one["kind"] == "Job":
            template = one["spec"]["template"]
            assert template["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] >= 1
            assert template["metadata"]["annotations"]["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert "nvidia.com/gpu" not in str(LASTING)  # what waits for work holds no GPU


def test_training_on_nodes_meets_at_its_first_pod() -> None:
    service, job = (
        next(one for one in JOBS if one["kind"] == kind and one["metadata"].get("name")) for kind in ("Service", "Job")
    )
    [container] = job["spec"]["template"]["spec"]["containers"]
    words = [*container["command"], *container["args"]]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(words[words.index("--nnodes") + 1])
    gpus = container["resources"]["requests"]["nvidia.com/gpu"]
    assert int(words[words.index("--nproc-per-node") + 1]) == gpus
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{name}:{port}" in words
    assert job["spec"]["template"]["spec"]["subdomain"] == name and service["spec"]["clusterIP"] == "None"


def test_dask_is_where_flows_look_for_it() -> None:
    settings = next(one for one in RESOURCES if one["kind"] == "ConfigMap")["data"]
    assert settings["DASK_SCHEDULER_ADDRESS"] == f"tcp://{DASK['metadata']['name']}-scheduler:8786"
    assert COMPOSE["x-flows-environment"]["DASK_SCHEDULER_ADDRESS"] == "tcp://dask-scheduler:8786"
    scaler = next(one for one in RESOURCES if one["kind"] == "DaskAutoscaler")["spec"]
    assert scaler["cluster"] == DASK["metadata"]["name"] and scaler["minimum"] >= 1
    assert SERVICES["dask-worker"]["deploy"]["replicas"] >= 2


def test_the_scheduler_of_kubernetes_has_dasks_own_routes_and_the_operators() -> None:
    [container] = BY_DASK["DaskCluster/scheduler"]["containers"]
    [routes] = [one["value"] for one in container["env"] if one["name"] == "DASK_DISTRIBUTED__SCHEDULER__HTTP__ROUTES"]
    own = yaml.safe_load((Path(distributed.__file__).parent / "distributed.yaml").read_text())
    usual = own["distributed"]["scheduler"]["http"]["routes"]
    assert json.loads(routes) == [*usual, "distributed.http.scheduler.api"]


def test_budgets_are_of_pods_that_there_are() -> None:
    labels = [one["spec"]["template"]["metadata"]["labels"] for one in RESOURCES if "template" in one.get("spec", {})]
    labels += [{"dask.org/cluster-name": "dask", "dask.org/component": part} for part in ("scheduler", "worker")]
    budgets = [one for one in RESOURCES if one["kind"] == "PodDisruptionBudget"]
    assert sorted(str(one["spec"]["selector"]["matchLabels"]) for one in budgets) == sorted(map(str, labels))


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
    [postgres] = [image for image in images if not image.startswith("geostream-")]
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", postgres)
    images.remove(postgres)
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
                assert "secretKeyRef" in entry.get("valueFrom", {}) or not SECRET.search(entry["name"])
    assert not [one for one in RESOURCES if one["kind"] == "Secret"]
    settings = next(one for one in RESOURCES if one["kind"] == "ConfigMap")["data"]
    assert not [name for name in settings if SECRET.search(name)]
    assert "ENV AWS_" not in (INFRA / "Dockerfile").read_text()


def test_every_folder_that_the_image_copies_passes_the_ignore_file() -> None:
    allowed = {line[1:] for line in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    copied = re.findall(r"^COPY (.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copied).split():
        assert source in allowed and list(ROOT.glob(source)), source


def test_prefect_asks_for_a_password_and_its_clients_have_it() -> None:
    given = "${GEOSTREAM_PREFECT_AUTH:?"
    assert SERVICES["prefect"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"].startswith(given)
    for service in SERVICES.values():
        if "PREFECT_API_URL" in service.get("environment", {}):
            assert service["environment"]["PREFECT_API_AUTH_STRING"].startswith(given)
    server = {entry["name"] for entry in LASTING["Deployment/prefect"]["containers"][0]["env"]}
    assert "PREFECT_SERVER_API_AUTH_STRING" in server
    worker, flow_run = LASTING["Deployment/worker"], FLOW_RUN["spec"]["template"]["spec"]
    for container in [*worker["initContainers"], *worker["containers"], *flow_run["containers"]]:
        assert "PREFECT_API_AUTH_STRING" in {entry["name"] for entry in container["env"]}


def test_deploying_on_kubernetes_leaves_alone_what_people_have_set() -> None:
    [container] = LASTING["Deployment/worker"]["initContainers"]
    script = container["args"][0]
    commands = [line for line in script.splitlines() if not line.startswith("#")]
    assert not [line for line in commands if "--overwrite" in line] and "infra.automations" in script
    deploys = [line for line in commands if " deploy " in line]  # the first one that makes it gives it its GPU
    assert "--name retrain" in deploys[0] and "gpus=1" in deploys[0] and "--all" in deploys[1]
