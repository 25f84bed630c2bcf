import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from app.api.errors import STATUS
from app.main import create_app
from app.settings import Settings
from tests.service import latent, listening, npy, picture, serving


@pytest.fixture(scope="module")
def document(models):
    return create_app(Settings(models=models, device="cpu")).openapi()


def test_it_describes_what_goes_in_and_comes_out(document):
    assert document["openapi"].startswith("3.")
    assert "composition" not in document["info"]["summary"]
    encode, decode = document["paths"]["/encode"]["post"], document["paths"]["/decode"]["post"]
    assert set(encode["requestBody"]["content"]) == {
        *("image/png", "image/jpeg", "image/webp", "image/avif", "application/octet-stream", "multipart/form-data"),
        *("application/x-npy", "application/x-safetensors", "application/zip"),
        *("video/mp4", "video/webm", "video/x-matroska"),
    }
    assert set(decode["requestBody"]["content"]) == {
        "application/x-npy",
        "application/x-npz",
        "application/x-safetensors",
        "application/x-pytorch",
        "application/octet-stream",
    }
    assert set(encode["responses"]["200"]["content"]) == {
        "application/x-npy",
        "application/x-npz",
        "application/x-safetensors",
        "application/octet-stream",
    }
    assert set(decode["responses"]["200"]["content"]) == {
        *("image/png", "image/jpeg", "image/webp", "image/avif", "application/zip", "application/x-npy"),
        *("image/apng", "multipart/mixed", "video/mp4", "video/webm", "video/x-matroska"),
        "application/octet-stream",
    }
    assert {parameter["name"] for parameter in encode["parameters"]} == {
        *("model", "latents", "posterior", "seed", "fit", "background", "precision", "tiling", "deterministic"),
        *("dtype", "frames"),
        *("X-Request-Timeout-Ms", "X-Request-Id"),
    }
    assert {parameter["name"] for parameter in decode["parameters"]} == {
        *("model", "latents", "precision", "tiling", "deterministic", "size", "fit", "offset", "quality", "bits"),
        *("dtype", "fps", "lossless"),
        "preview",
        *("X-Request-Timeout-Ms", "X-Request-Id", "X-Latents-Family"),
    }
    show = document["paths"]["/preview/stream"]["post"]["parameters"]
    assert "X-Request-Timeout-Ms" not in {parameter["name"] for parameter in show}  # nothing waits there
    assert not any(parameter["required"] for operation in (encode, decode) for parameter in operation["parameters"])
    for operation in (encode, decode):
        assert {"X-Model", "X-Plan", "X-Image-Size", "Server-Timing"} <= set(operation["responses"]["200"]["headers"])
    assert "X-Posterior" in encode["responses"]["200"]["headers"]
    assert "X-Warning" in decode["responses"]["200"]["headers"]


def test_every_operation_tells_its_errors_in_one_form(document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            errors = {status: each for status, each in operation["responses"].items() if status[0] != "2"}
            if path.startswith("/healthz"):
                assert list(errors) == ["503"]
                continue
            assert operation["security"]
            assert {"401", "403"} <= set(errors)
            assert path == "/metrics" or {"422", "500", "default"} <= set(errors)
            for error in errors.values():
                assert error["content"] == {
                    "application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}
                }
            for status, error in errors.items():  # when to come back
                assert ("Retry-After" in error.get("headers", {})) == (status in ("429", "503"))


def test_the_errors_of_the_work_are_those_of_the_table(document):
    told = {
        code
        for path in ("/encode", "/decode")
        for status, each in document["paths"][path]["post"]["responses"].items()
        if status not in ("200", "default")
        for code in re.findall("`([a-z_]+)`: [A-Z]", each["description"])
    }
    nobody_reads = {"client_gone"}
    assert told == {kind.code for kind in STATUS.values()} - nobody_reads


def test_every_parameter_and_header_says_what_it_is_for(document):
    for operations in document["paths"].values():
        for operation in operations.values():
            assert operation["summary"]
            assert operation["description"]
            for parameter in operation.get("parameters", ()):
                assert len(parameter["description"]) > 9, parameter["name"]
            for answer in operation["responses"].values():
                assert answer["description"]
                assert all(header["description"] for header in answer.get("headers", {}).values())


def test_the_guide_has_every_parameter_and_header(document):
    guide = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    for path in ("/encode", "/decode"):
        operation = document["paths"][path]["post"]
        names = [parameter["name"] for parameter in operation["parameters"]]
        names += [header for answer in operation["responses"].values() for header in answer.get("headers", ())]
        for name in names:
            assert f"`{name}`" in guide or f"`{name}=" in guide, name
        for media in (*operation["requestBody"]["content"], *operation["responses"]["200"]["content"]):
            assert f"`{media}`" in guide, media


def test_every_reference_leads_somewhere(document):
    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(document))
    assert found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def test_operations_have_names_of_their_own(document):
    names = [operation["operationId"] for operations in document["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)
    assert set(names) == {
        *("encode", "decode", "compare", "list_models", "get_model", "plan_model"),
        *("look_on", "show"),
        *(
            "load_model",
            "upload_model",
            "delete_model",
            "unload_model",
            "pin_model",
            "unpin_model",
            "retest_model",
            "live",
            "ready",
            "startup",
            "metrics",
        ),
    }


def test_a_client_of_openapi_python_client_round_trips_a_picture(models, document, tmp_path, monkeypatch):
    pytest.importorskip("openapi_python_client")
    source = tmp_path / "openapi.json"
    source.write_text(json.dumps(document))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none"]
    command += ["--path", str(source), "--output-path", str(tmp_path / "generated_client")]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert made.returncode == 0, made.stdout + made.stderr
    monkeypatch.syspath_prepend(tmp_path)
    latents = "generated_client.api.latents."
    encode, decode = (importlib.import_module(latents + name) for name in ("encode", "decode"))
    file = importlib.import_module("generated_client.types").File
    with listening(models, default_model="kl") as (_, port):
        client = importlib.import_module("generated_client").Client(f"http://127.0.0.1:{port}", timeout=60)
        with client:
            encoded = encode.sync_detailed(client=client, body=file(io.BytesIO(picture(35, 33))))
            assert (encoded.status_code, encoded.headers["X-Image-Size"]) == (200, "35x33")
            again = decode.sync(client=client, body=encoded.parsed, size=encoded.headers["X-Image-Size"])
            assert Image.open(again.payload).size == (35, 33)
            refused = decode.sync(client=client, body=file(io.BytesIO(b"no latent")))
            assert (refused.status, refused.code) == (415, "unsupported_media")


@pytest.mark.parametrize("operation", ["encode", "decode"])
async def test_the_type_of_errors_alone_is_what_clients_of_openapi_generator_accept(models, operation):
    body = picture() if operation == "encode" else npy(latent())
    async with serving(models, default_model="kl") as service:
        plain = await service.post(f"/{operation}", content=body)
        answer = await service.post(f"/{operation}", content=body, headers={"Accept": "application/problem+json"})
        assert (answer.status_code, answer.headers["content-type"]) == (200, plain.headers["content-type"])
        assert answer.content == plain.content
