"""What callers and dashboards hold on to: the OpenAPI document, the error codes, the metrics.

Each is kept in a file here. `python -m tests.snapshots` writes them anew, and the change is then one of the commit.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from app.api.errors import STATUS
from app.main import create_app
from app.settings import Settings
from tests.service import latent, npy, serving
from tests.store.weights import state_of

HERE = Path(__file__).parent
NAMES = ("openapi", "errors", "metrics")


def read(name: str) -> Any:
    """As it was kept."""
    return json.loads((HERE / f"{name}.json").read_text())


def write(name: str, content: Any) -> None:
    """Keeps it."""
    (HERE / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def current(name: str) -> Any:
    """As it is now."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        save_file(state_of("taesd"), models / "tiny.safetensors")
        match name:
            case "openapi":
                return _openapi(models)
            case "errors":
                return _errors()
            case _:
                return asyncio.run(_metrics(models))


def _openapi(models: Path) -> Any:
    document = json.loads(json.dumps(create_app(Settings(models=models, device="cpu")).openapi()))
    del document["info"]["version"]
    return document


def _errors() -> Any:
    rows = {kind.code: {"status": kind.status, "retryable": kind.retryable} for kind in STATUS.values()}
    return dict(sorted(rows.items()))


async def _metrics(models: Path) -> Any:
    """The type and the labels of each: of what is counted as it is declared, of what is read as a service shows it."""
    async with serving(models) as service:
        await service.post("/decode", content=npy(latent(1, 4, 4, 4)))
        families = list(service.engine.metrics.registry.collect())
    moved = {each._name: each for each in vars(service.engine.metrics).values() if hasattr(each, "_labelnames")}
    found = {}
    for family in families:
        if not family.name.startswith("vae_"):
            continue  # of the process, as the client library has them
        declared = moved.get(family.name)
        labels = declared._labelnames if declared else {label for each in family.samples for label in each.labels}
        found[family.name] = {"type": family.type, "labels": sorted(labels)}
        if buckets := getattr(declared, "_upper_bounds", None):
            found[family.name]["buckets"] = [str(bound) for bound in buckets]
    assert moved.keys() <= found.keys()
    return dict(sorted(found.items()))
