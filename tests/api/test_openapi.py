import pytest

from app.main import create_app
from app.settings import Settings
from tests.service import serving


@pytest.fixture(scope="module")
def document(models):
    return create_app(Settings(models=models, device="cpu")).openapi()


def test_it_describes_what_goes_in_and_comes_out(document):
    assert document["openapi"].startswith("3.")
    assert "composition" not in document["info"]["summary"]
    encode, decode = document["paths"]["/encode"]["post"], document["paths"]["/decode"]["post"]
    assert set(encode["requestBody"]["content"]) == {"image/png", "image/jpeg", "image/webp", "multipart/form-data"}
    assert set(decode["requestBody"]["content"]) == {
        "application/x-npy",
        "application/x-npz",
        "application/x-safetensors",
    }
    assert set(encode["responses"]["200"]["content"]) == {
        "application/x-npy",
        "application/x-npz",
        "application/x-safetensors",
    }
    assert set(decode["responses"]["200"]["content"]) == {
        *("image/png", "image/jpeg", "image/webp", "application/zip", "application/x-npy")
    }
    assert {parameter["name"] for parameter in encode["parameters"]} == {
        *("model", "latents", "posterior", "seed", "fit", "background", "precision", "tiling", "deterministic"),
        "X-Request-Timeout-Ms",
    }
    assert {parameter["name"] for parameter in decode["parameters"]} == {
        *("model", "latents", "precision", "tiling", "deterministic", "size", "quality", "bits"),
        *("X-Request-Timeout-Ms", "X-Latents-Family"),
    }
    assert not any(parameter["required"] for operation in (encode, decode) for parameter in operation["parameters"])
    for operation in (encode, decode):
        assert {"X-Model", "X-Plan", "X-Image-Size", "Server-Timing"} <= set(operation["responses"]["200"]["headers"])
    assert "X-Warning" in decode["responses"]["200"]["headers"]


def test_every_operation_tells_its_errors_in_one_form(document):
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]  # FastAPI's own form, which is never sent
            if not path.startswith(("/healthz", "/metrics")):
                assert list(operation["responses"]["default"]["content"]) == ["application/problem+json"]
                assert operation["security"]


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


async def test_the_document_and_its_page_are_served(models, document):
    async with serving(models) as service:
        answer = await service.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        assert answer.json() == document
        page = await service.get("/docs")
        assert page.headers["content-type"].startswith("text/html")
        assert "openapi.json" in page.text
