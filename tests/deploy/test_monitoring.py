"""Dashboard and rules speak of metrics that the service has, and alerts of what the operator can read up."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.service import latent, npy, serving

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "latentd.json").read_text())

PROMETHEUS = {"up", "ALERTS", "job", "instance", "le"}
"""What it adds to what it scrapes."""
SELECTOR = re.compile(r"\b([a-zA-Z_][\w:]*)\{([^}]*)\}")
NAME = re.compile(r"\b(?:vae|process)_\w+|\b\w+:\w+:\w+")
BY = re.compile(r"\bby \(([^)]*)\)")


def groups(name: str) -> list[dict]:
    return yaml.safe_load((RULES / name).read_text())["groups"]


RECORDED = {rule["record"]: rule["expr"] for group in groups("recording.yml") for rule in group["rules"]}
ALERTS = [rule for group in groups("alerts.yml") for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"panel {panel['title']}", target["expr"]
    yield from RECORDED.items()
    scaler = yaml.safe_load((ROOT / "deploy/kubernetes/components/autoscaling/scaledobject.yaml").read_text())
    for trigger in scaler["spec"]["triggers"]:
        yield "the scaler", trigger["metadata"]["query"]
    for rule in ALERTS:
        yield rule["alert"], rule["expr"]


@pytest.fixture(scope="module")
async def samples(models):
    """Labels by name of sample: what /metrics has after a request, and what it declares and nothing has moved."""
    async with serving(models, default_model="kl") as service:
        assert (await service.post("/decode", content=npy(latent()))).status_code == 200
        text = (await service.get("/metrics")).text
        found = {name: set(labels) for name, labels in _declared(service.engine.metrics)}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def _declared(metrics) -> Iterator[tuple[str, tuple[str, ...]]]:
    for metric in vars(metrics).values():
        if hasattr(metric, "_labelnames"):
            for suffix in ("_total",) if metric._type == "counter" else ("_bucket", "_sum", "_count"):
                yield metric._name + suffix, metric._labelnames


@pytest.mark.parametrize(("where", "expr"), [pytest.param(*each, id=each[0]) for each in expressions()])
async def test_names_and_labels_are_those_of_the_service(samples, where, expr):
    names = set(NAME.findall(expr))
    assert names <= set(samples) | set(RECORDED), where
    assert names or "up{" in expr, "reads nothing of the service"
    for name, matchers in SELECTOR.findall(expr):
        labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
        if name in samples:
            assert labels <= samples[name] | PROMETHEUS, (where, name)
    kept = {label.strip() for labels in BY.findall(expr) for label in labels.split(",")}
    assert kept <= set().union(*(samples.get(name, set()) for name in names)) | PROMETHEUS, where


def test_panels_are_drawn_side_by_side_and_none_twice():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule["alert"]) for rule in ALERTS])
def test_each_alert_has_its_paragraph_and_its_unit_test(rule):
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert anchor == rule["alert"].lower()
    assert f"alertname: {rule['alert']}\n" in (RULES / "rules_test.yml").read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool, of the package prometheus, is not installed")
@pytest.mark.parametrize("arguments", [["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]])
def test_promtool_agrees(arguments):
    done = subprocess.run(["promtool", *arguments], cwd=RULES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
