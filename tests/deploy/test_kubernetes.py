"""Manifests, compose file and Dockerfile say what the settings, the routes and the drain are."""

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.api.door.access import OFTEN
from app.api.door.bounds import PROBES
from app.arguments import parser
from app.engine.worker import STOP_SECONDS
from app.server import CLOSING_SECONDS
from app.settings import PREFIX, Settings
from app.store.known import named

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = [COMPOSE["services"][name] for name in ("latentd", "latentd-gpu")]
UID = 10001


def read(path: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((KUBERNETES / path).read_text())
    return document


def pod(path: str) -> dict[str, Any]:
    spec: dict[str, Any] = read(path)["spec"]["template"]["spec"]
    return spec


BASE = pod("base/deployment.yaml")
(MAIN,) = BASE["containers"]
CONTAINERS = [MAIN, *pod("components/fetch/fetch.yaml")["initContainers"]]
EVERYTHING = {
    "apiVersion": "kustomize.config.k8s.io/v1beta1",
    "kind": "Kustomization",
    "resources": ["../gpu"],
    "components": [f"../components/{name}" for name in ("fetch", "monitoring", "autoscaling")],
}
HASHED = EVERYTHING | {"components": ["../components/hashing"]}
CUSTOM = {"PodMonitor", "ScaledObject"}


def variables() -> Iterator[tuple[str, str, str | None]]:
    for path in ("base/deployment.yaml", "gpu/card.yaml"):
        for each in pod(path)["containers"][0].get("env", []):
            yield path, each["name"], each["value"]
    for service in SERVICES:
        for each in service["environment"]:
            yield "docker-compose.yml", each, None  # handed on
    for name, value in re.findall(rf"\b({PREFIX}\w+)=(\S+)", DOCKERFILE):
        yield "Dockerfile", name, value


@pytest.mark.parametrize(("where", "name", "value"), list(variables()))
def test_each_variable_is_a_setting_and_its_value_one_of_it(where, name, value, monkeypatch):
    field = name.removeprefix(PREFIX).lower()
    assert field in Settings.model_fields, where
    if value is not None:
        monkeypatch.setenv(name, value)
        assert getattr(Settings(), field) != Settings.model_fields[field].default, "says what is so anyway"


def test_there_is_time_for_a_drain():
    hurry = CLOSING_SECONDS + STOP_SECONDS
    drain = next(float(each["value"]) for each in MAIN["env"] if each["name"] == "LATENTD_DRAIN_SECONDS")
    ahead = float(MAIN["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert BASE["terminationGracePeriodSeconds"] >= ahead + drain + hurry
    for service in SERVICES:
        assert int(service["stop_grace_period"].removesuffix("s")) >= Settings().drain_seconds + hurry


def test_ports_are_one():
    args = parser().parse_args(MAIN["args"])
    assert args.host == "0.0.0.0"
    (service,) = read("base/service.yaml")["spec"]["ports"]
    (ingress,) = read("base/network.yaml")["spec"]["ingress"]
    (endpoint,) = read("components/monitoring/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    (port,) = MAIN["ports"]
    assert {service["targetPort"], ingress["ports"][0]["port"], endpoint["port"]} == {port["name"]}
    assert port["containerPort"] == service["port"] == args.port
    assert f"EXPOSE {args.port}\n" in DOCKERFILE
    assert all(str(each["ports"][0]).endswith(f":{args.port}") for each in SERVICES)
    (scrape,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    assert scrape["dns_sd_configs"][0]["port"] == args.port


def test_probes_ask_what_there_is():
    for name in ("startup", "readiness", "liveness"):
        probe = MAIN[f"{name}Probe"]["httpGet"]
        assert probe["path"] in PROBES
        assert probe["path"].endswith(name.replace("readiness", "ready").replace("liveness", "live"))
        assert probe["port"] == "http"
    assert read("components/monitoring/podmonitor.yaml")["spec"]["podMetricsEndpoints"][0]["path"] in OFTEN
    assert "/opt/latentd/healthcheck.py" in re.findall(r"HEALTHCHECK.*?\n\n", DOCKERFILE, re.DOTALL)[0]


def test_the_user_is_one_and_may_do_nothing_else():
    security = BASE["securityContext"]
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {UID}
    assert security["runAsNonRoot"]
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert BASE["automountServiceAccountToken"] is False
    assert f"USER {UID}:{UID}\n" in DOCKERFILE
    for container in CONTAINERS:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
    for service in SERVICES:
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["tmpfs"][0].startswith(f"/scratch:uid={UID},gid={UID},")


def test_what_is_written_to_is_mounted():
    written = {"/models", "/scratch"}
    assert re.findall(r"LATENTD_MODELS=(\S+)", DOCKERFILE) == ["/models"]
    assert re.findall(r"\bHOME=(\S+)", DOCKERFILE) == ["/scratch"]
    for container in CONTAINERS:
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == written
        assert {mount["name"] for mount in mounts.values()} <= {volume["name"] for volume in BASE["volumes"]}
    (keys,) = (volume["secret"] for volume in BASE["volumes"] if volume["name"] == "keys")
    folder = next(mount["mountPath"] for mount in MAIN["volumeMounts"] if mount["name"] == "keys")
    files = {each["value"] for each in MAIN["env"] if each["name"].endswith("_FILE")}
    asked = re.findall(r"--from-literal=([\w-]+)=", (KUBERNETES / "base/kustomization.yaml").read_text())
    assert files == {f"{folder}/{name}" for name in asked}
    assert f"secret generic {keys['secretName']} " in (KUBERNETES / "base/kustomization.yaml").read_text()


def test_what_is_fetched_is_known():
    args = parser().parse_args(CONTAINERS[1]["args"])
    assert args.command == "fetch"
    assert named(args.name)
    assert args.models == "/models"


@pytest.fixture(scope="module")
def kustomize(tmp_path_factory) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """What it makes of an overlay."""
    tool = next((each for each in ("kustomize", "kubectl") if shutil.which(each)), None)
    if tool is None:
        pytest.skip("neither kustomize nor kubectl is installed")

    def built(overlay: dict[str, Any]) -> list[dict[str, Any]]:
        copy = tmp_path_factory.mktemp("kubernetes")
        shutil.copytree(KUBERNETES, copy, dirs_exist_ok=True)
        (copy / "overlay").mkdir()
        (copy / "overlay" / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        command = [tool, "build" if tool == "kustomize" else "kustomize", str(copy / "overlay")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return built


def test_all_of_it_speaks_of_the_same_pods(kustomize):
    found = {document["kind"]: document for document in kustomize(EVERYTHING)}
    mine = {"matchLabels": {"app.kubernetes.io/name": "latentd"}}
    deployment = found["Deployment"]["spec"]
    assert deployment["selector"] == mine
    assert mine["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()
    assert found["Service"]["spec"]["selector"] == mine["matchLabels"]
    assert found["PodDisruptionBudget"]["spec"]["selector"] == mine
    assert found["NetworkPolicy"]["spec"]["podSelector"] == mine
    assert found["PodMonitor"]["spec"]["selector"] == mine
    assert found["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert "replicas" not in deployment  # they are the scaler's
    made = deployment["template"]["spec"]
    assert {each["image"] for each in (*made["containers"], *made["initContainers"])} == {"latentd:gpu"}
    assert made["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_gateway_finds_the_pods_and_is_found(kustomize):
    found = {(each["kind"], each["metadata"]["name"]): each for each in kustomize(HASHED)}
    pods, gateway = found["Service", "latentd-pods"]["spec"], found["Service", "latentd-gateway"]["spec"]
    assert pods["clusterIP"] == "None"
    assert pods["selector"] == found["Service", "latentd"]["spec"]["selector"]
    front = found["Deployment", "latentd-gateway"]["spec"]["template"]
    assert gateway["selector"].items() <= front["metadata"]["labels"].items()
    assert not pods["selector"].items() <= front["metadata"]["labels"].items()
    (written,) = (each["data"]["haproxy.cfg"] for (kind, _), each in found.items() if kind == "ConfigMap")
    assert f"latentd-pods:{pods['ports'][0]['port']}\n" in written
    assert f"bind :{front['spec']['containers'][0]['ports'][0]['containerPort']}\n" in written


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="needs haproxy")
def test_haproxy_reads_the_gateways_configuration():
    file = KUBERNETES / "components/hashing/haproxy.cfg"
    done = subprocess.run(["haproxy", "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("overlay", "count"), [(EVERYTHING, 5), (HASHED, 10)], ids=["everything", "hashed"])
def test_it_is_what_the_schemas_want(kustomize, overlay, count):
    """Those of Kubernetes itself; custom resources are the operators' own."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="the extra `deploy` is not installed")
    own = [each for each in kustomize(overlay) if each["kind"] not in CUSTOM]
    assert len(own) == count
    for document in own:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
