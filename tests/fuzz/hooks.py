"""What schemathesis is told beyond the document: files for its binary bodies, models that are there, what a 5xx may be.

Loaded by it: SCHEMATHESIS_HOOKS=tests.fuzz.hooks.
"""

from random import Random
from typing import Any

import schemathesis
from hypothesis import strategies as st

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import TARGETS

FILES = {
    "application/x-npy": ("npy",),
    "application/x-npz": ("npz",),
    "application/x-safetensors": ("safetensors", "weights"),
    "application/x-pytorch": ("saved", "archive"),
    "image/png": ("png",),
    "image/jpeg": ("jpeg",),
    "image/webp": ("webp",),
    "image/avif": ("avif",),
    "application/octet-stream": ("npy", "safetensors", "png", "saved"),
}
"""Media types, and whose files are sent as them."""
MODELS = ("kl", "tiny", "layered")
BUSY = {"unavailable", "too_many_bytes", "model_changed", "deadline_exceeded", "out_of_memory", "disk_full"}
"""Codes of a 5xx that says what it is; whatever else is one is a defect."""


def files(*names: str) -> st.SearchStrategy[bytes]:
    """As they are, and as often with something wrong."""
    sound = st.sampled_from([body for name in names for body in TARGETS[name].seeds()])
    wrong = st.builds(lambda body, seed: mutated(Random(seed), body), sound, st.integers(0, 1 << 32))
    return sound | wrong


for media, names in FILES.items():
    schemathesis.openapi.media_type(media, files(*names))


@schemathesis.hook
def map_query(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """A name that was made up becomes one of the folder's, more often than not."""
    if query and isinstance(name := query.get("model"), str) and len(name) % 4:
        query["model"] = MODELS[len(name) % len(MODELS)]
    return query


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Likewise."""
    if path_parameters:
        for key in {"name", "model"} & path_parameters.keys():
            if isinstance(name := path_parameters[key], str) and len(name) % 3:
                path_parameters[key] = MODELS[len(name) % len(MODELS)]
    return path_parameters


@schemathesis.check
def errors_are_problems(context: Any, response: Any, case: Any) -> None:
    """An error is a problem+json, or below /remote/ what its clients read; a 5xx is one of those that are meant."""
    if response.status_code < 400 or case.method == "HEAD":
        return
    media, body = response.headers["content-type"][0], response.json()
    if case.operation.path.startswith("/remote/"):
        assert set(body) == {"error"}, body
        assert response.status_code != 500, body
        return
    if case.operation.path.startswith(("/healthz", "/health", "/livez", "/readyz", "/v2")) and "status" in body:
        return
    assert media == "application/problem+json", media
    assert body["status"] == response.status_code, body
    assert response.status_code < 500 or body["code"] in BUSY, body
