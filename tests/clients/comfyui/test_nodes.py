import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from clients.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, WEB_DIRECTORY, nodes
from clients.comfyui.nodes import DEFAULT, LatentdDecode, LatentdEncode, LatentdLoader
from clients.comfyui.wire import Server


class FakeVAE:
    def decode(self, latents):
        return latents + 1

    def encode(self, pixels):
        return pixels + 2


@pytest.fixture
def connected(monkeypatch):
    """The arguments of `connect`, which gives a VAE that adds."""
    calls: list[tuple[str, str]] = []

    def connect(model, url):
        calls.append((model, url))
        return FakeVAE()

    monkeypatch.setattr(nodes, "connect", connect)
    return calls


def test_the_folder_says_what_comfyui_looks_for():
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    assert set(NODE_DISPLAY_NAME_MAPPINGS.values()) == {
        "VAE Decode (latentd)",
        "VAE Encode (latentd)",
        "Load remote VAE (latentd)",
    }
    assert WEB_DIRECTORY == "web"


@pytest.mark.parametrize("kind", NODE_CLASS_MAPPINGS.values())
def test_a_node_has_the_method_that_it_names_with_its_inputs(kind):
    inputs = kind.INPUT_TYPES()["required"]
    code = getattr(kind, kind.FUNCTION).__code__
    assert set(code.co_varnames[1 : code.co_argcount]) == set(inputs)
    assert not any("key" in name for name in inputs)  # inputs are saved with the workflow
    assert kind.VALIDATE_INPUTS("of another service") is True


def test_decode_takes_the_samples(connected):
    samples = torch.zeros(1, 4, 2, 2)
    (pictures,) = LatentdDecode().decode({"samples": samples, "batch_index": [0]}, "x", "u")
    assert torch.equal(pictures, samples + 1)
    assert connected == [("x", "u")]


def test_decode_takes_the_first_kind_of_several(connected):
    both = SimpleNamespace(is_nested=True, unbind=lambda: [torch.zeros(1), torch.ones(1)])
    assert LatentdDecode().decode({"samples": both}, "x", "")[0].tolist() == [1.0]


def test_encode_gives_samples(connected):
    (latent,) = LatentdEncode().encode(torch.zeros(1), "x", "")
    assert set(latent) == {"samples"}
    assert latent["samples"].tolist() == [2.0]


@pytest.fixture
def comfy(monkeypatch):
    """What of ComfyUI's model_management is used."""
    management = SimpleNamespace(
        intermediate_device=lambda: torch.device("cpu"),
        intermediate_dtype=lambda: torch.float16,
        throw_exception_if_processing_interrupted=lambda: None,
    )
    module = ModuleType("comfy")
    module.model_management = management  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "comfy", module)
    return management


@pytest.mark.parametrize(("model", "name"), [(DEFAULT, ""), ("x", "x")])
def test_the_vae_is_that_of_the_service_and_works_as_comfyui_says(monkeypatch, comfy, model, name):
    monkeypatch.setenv("LATENTD_URL", "http://gpu-host:1")
    given: list[Any] = []
    monkeypatch.setattr(nodes, "remote_vae", lambda *arguments: given.extend(arguments))
    LatentdLoader().load(model, "")
    server, asked, check, place = given
    assert (server, asked) == (Server("http://gpu-host:1"), name)
    assert check is comfy.throw_exception_if_processing_interrupted
    assert place(torch.zeros(1)).dtype == torch.float16
