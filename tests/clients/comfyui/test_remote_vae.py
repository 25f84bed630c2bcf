import io
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from app.vae.families import FAMILIES
from clients.comfyui import remote_vae as module
from clients.comfyui.remote_vae import RemoteVAE, parts, remote_vae
from clients.comfyui.wire import LatentdError, Model, Server, never
from tests.clients.comfyui.service import ok, telling


def row(family: str = "sd1", name: str = "x") -> Model:
    of = FAMILIES[family]
    return Model(name, family, of.latent_channels, of.spatial_factor)


def here(result):
    return result


def vae(server: Server, family: str = "sd1", place=here) -> RemoteVAE:
    return RemoteVAE(server, row(family), never, place)


def answer(array: np.ndarray):
    file = io.BytesIO()
    np.save(file, array)
    return ok(file.getvalue())


def asked(told, index: int = 0):
    """The path with its query, and the array."""
    return told.asked[index].line.split()[1], np.load(io.BytesIO(told.asked[index].body))


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_those_that_comfyui_has(family):
    made, of = vae(Server("http://x"), family), FAMILIES[family]
    convention = made.convention.latents
    assert made.latent_channels == of.channels(convention)
    assert made.spacial_compression_decode() == made.spacial_compression_encode() == of.side(convention)
    assert made.downscale_ratio == made.upscale_ratio == of.side(convention)
    assert made.temporal_compression_decode() is None


def test_decode_sends_raw_latents_and_returns_pictures():
    latents = torch.randn(2, 4, 3, 5)
    with telling(answer(np.full((2, 24, 40, 3), -1, np.float16))) as told:
        pictures = vae(told.server).decode(latents)
    path, array = asked(told)
    assert path == "/decode?model=x&latents=raw&dtype=float16"
    assert array.dtype == np.float32
    assert (array == latents.numpy()).all()
    assert pictures.shape == (2, 24, 40, 3)
    assert pictures.dtype == torch.float32
    assert (pictures == 0).all()


def test_encode_crops_and_returns_raw_latents():
    back = np.random.default_rng(0).standard_normal((1, 4, 2, 3)).astype(np.float32)
    with telling(answer(back)) as told:
        latents = vae(told.server).encode(torch.ones(1, 17, 29, 4))
    path, array = asked(told)
    assert path == "/encode?model=x&latents=raw&dtype=float32"
    assert (array.dtype, array.shape) == (np.uint8, (1, 16, 24, 3))
    assert (latents.numpy() == back).all()


@pytest.mark.parametrize(("given", "sent"), [(4, 4), (3, 3), (5, 4)])
def test_a_model_with_alpha_takes_and_gives_it(given, sent):
    with telling(answer(np.zeros((1, 16, 2, 2), np.float32)), answer(np.full((1, 16, 16, 4), 1, np.float16))) as told:
        made = RemoteVAE(told.server, replace(row("wan21"), pixel_channels=4), never, here)
        made.encode(torch.ones(1, 16, 16, given))
        pictures = made.decode(torch.zeros(1, 16, 1, 2, 2))
    assert asked(told)[1].shape == (1, 16, 16, sent)
    assert made.output_channels == pictures.shape[-1] == 4


def test_latents_that_are_folded_travel_scaled():
    with telling(answer(np.zeros((1, 32, 48, 3), np.float16))) as told:
        vae(told.server, "flux2").decode(torch.randn(1, 128, 2, 3))
    assert "latents=scaled" in asked(told)[0]


def test_the_tiled_methods_are_the_whole_ones():
    latents, pixels = torch.randn(1, 4, 2, 2), torch.rand(1, 16, 16, 3)
    with telling(answer(np.zeros((1, 16, 16, 3), np.float16))) as told:
        made = vae(told.server)
        tiled = made.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2, tile_t=None, overlap_t=None)
        assert torch.equal(tiled, made.decode(latents))
    assert told.asked[0].body == told.asked[1].body
    with telling(answer(np.zeros((1, 4, 2, 2), np.float32))) as told:
        made = vae(told.server)
        assert torch.equal(made.encode_tiled(pixels, 64, 64, 16), made.encode(pixels))


def test_of_a_videos_latents_the_first_frame_is_decoded():
    latents = torch.randn(1, 4, 3, 2, 2)
    with telling(answer(np.zeros((1, 16, 16, 3), np.float16))) as told:
        vae(told.server).decode(latents)
    assert (asked(told)[1] == latents[:, :, 0].numpy()).all()


@pytest.mark.parametrize(("family", "factor", "channels"), [("wan21", 8, 16), ("wan22", 16, 48)])
def test_latents_of_wan_have_one_frame(family, factor, channels):
    sent = np.random.default_rng(0).standard_normal((2, channels, 2, 3)).astype(np.float32)
    answers = answer(sent), answer(np.zeros((2, 2 * factor, 3 * factor, 3), np.float16))
    with telling(*answers) as told:
        latents = vae(told.server, family).encode(torch.ones(2, 2 * factor, 3 * factor, 3))
        assert latents.shape == (2, channels, 1, 2, 3)
        assert vae(told.server, family).decode(latents).shape == (2, 2 * factor, 3 * factor, 3)
    assert (asked(told, 1)[1] == sent).all()
    with pytest.raises(LatentdError, match="video is not supported yet: these latents have 3 frames"):
        vae(told.server, family).decode(torch.zeros(1, channels, 3, 2, 2))


@pytest.mark.parametrize("shape", [(1, 16, 2, 2), (4, 2, 2), (1, 4, 8)])
def test_latents_of_another_vae_are_not_sent(shape):
    with pytest.raises(LatentdError, match="takes latents of 4 channels"):
        vae(Server("http://127.0.0.1:9")).decode(torch.zeros(shape))


def test_options_of_other_vaes_are_refused():
    with pytest.raises(LatentdError, match="num_chunks"):
        vae(Server("http://127.0.0.1:9")).decode(torch.zeros(1, 4, 2, 2), vae_options={"num_chunks": 1})


def test_many_pictures_go_in_several_requests(monkeypatch):
    monkeypatch.setattr(module, "REQUEST_PIXELS", 2 * 256)
    frames = [np.full((n, 16, 16, 3), n - 2, np.float16) for n in (2, 1)]
    with telling(*map(answer, frames)) as told:
        pictures = vae(told.server).decode(torch.randn(3, 4, 2, 2))
    assert [len(asked(told, i)[1]) for i in (0, 1)] == [2, 1]
    assert pictures.amax(dim=(1, 2, 3)).tolist() == [0.5, 0.5, 0.0]


def test_a_picture_of_any_size_is_a_request(monkeypatch):
    monkeypatch.setattr(module, "REQUEST_PIXELS", 1)
    assert [len(part) for part in parts(np.zeros((3, 1)), 2)] == [1, 1, 1]


def test_results_are_put_where_they_are_wanted():
    with telling(answer(np.zeros((1, 16, 16, 3), np.float16))) as told:
        made = vae(told.server, place=lambda result: result.half())
        assert made.decode(torch.zeros(1, 4, 2, 2)).dtype == torch.float16


def test_weights_are_not_here():
    made = vae(Server("http://x"))
    made.throw_exception_if_invalid()
    assert (made.model_size(), made.is_dynamic()) == (0, False)
    with pytest.raises(LatentdError, match="the weights of 'x' are at http://x"):
        made.get_sd()


def listed(default: str | None):
    rows = [{"name": name, "error": None} for name in ("one", "two")]
    return ok(json.dumps({"models": rows, "default": default}).encode())


def test_without_a_name_it_is_the_services_default():
    with telling(listed("one"), ok(json.dumps({**asdict(row("sd3", "one")), "error": None}).encode())) as told:
        assert remote_vae(told.server, "", never, here).latent_channels == 16
    assert told.asked[1].line.startswith("GET /models/one ")


def test_without_a_name_and_a_default_one_is_to_be_chosen():
    with telling(listed(None)) as told, pytest.raises(LatentdError, match="choose one of: one, two"):
        remote_vae(told.server, "", never, here)
