"""RemoteVAE beside the VAE of diffusers that it stands for, the same weights on the service."""

import gc

import httpx
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from latentd_client import Client, RemoteVAE, UnexpectedAnswer, UnknownModel, UnsupportedCheckpoint
from latentd_client.remote_vae import config_of
from latentd_client.results import Model
from tests.service import npy

KL = ("sd1", "sdxl", "sd3", "flux", "flux2")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures(n: int = 1) -> torch.Tensor:
    return noise(n, 3, 32, 48).clamp(-1, 1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def remote(url):
    found: dict[str, RemoteVAE] = {}
    with Client(url) as client:
        yield lambda family: found.setdefault(family, RemoteVAE(url, f"{family}-tiny", client=client))


@pytest.mark.parametrize("family", KL)
def test_the_configuration_says_what_pipelines_read(local, remote, family):
    theirs, ours = local[family].config, remote(family).config
    for name in ("in_channels", "out_channels", "latent_channels"):
        assert ours[name] == theirs[name], name
    assert ours.force_upcast is False  # the service knows better
    assert len(ours.block_out_channels) == len(theirs.block_out_channels)
    if family == "flux2":
        assert ours.batch_norm_eps == theirs.batch_norm_eps
        assert tuple(ours.patch_size) == tuple(theirs.patch_size)
        assert_close(remote(family).bn.running_mean, local[family].bn.running_mean, rtol=0, atol=0)
        assert_close(remote(family).bn.running_var, local[family].bn.running_var, rtol=0, atol=0)
    else:
        assert ours.scaling_factor == theirs.scaling_factor
        assert (ours.shift_factor or None) == theirs.shift_factor
        assert (ours.latents_mean, ours.latents_std) == (None, None)


@pytest.mark.parametrize("family", ["wan", "qwen", "wan22", "qwen21"])
def test_the_configuration_has_what_pipelines_of_clips_read(local, remote, family):
    theirs, ours = local[family].config, remote(family).config
    assert ours.z_dim == theirs.z_dim
    assert_close(torch.tensor(ours.latents_mean), torch.tensor(theirs.latents_mean))
    assert_close(torch.tensor(ours.latents_std), torch.tensor(theirs.latents_std))
    assert ours.out_channels == (4 if family == "qwen21" else 3)
    if family != "wan22":  # whose pipelines have the factor from elsewhere
        assert len(remote(family).temperal_downsample) == len(theirs.temperal_downsample)


@pytest.mark.parametrize(("family", "side"), [("wan", 8), ("qwen", 8), ("wan22", 16), ("qwen21", 16)])
@torch.no_grad()
def test_pictures_are_clips_of_one_frame_where_they_are_there(local, remote, family, side):
    channels, colours = local[family].config.z_dim, remote(family).config.out_channels
    x = noise(2, colours, 1, 32, 48).clamp(-1, 1)
    z = noise(2, channels, 1, 32 // side, 48 // side)
    expected, found = local[family].encode(x).latent_dist, remote(family).encode(x).latent_dist
    assert found.mode().shape == z.shape
    assert_close(found.mode(), expected.mode(), rtol=1e-4, atol=1e-4)
    assert_close(found.sample(seeded()), expected.sample(seeded()), rtol=1e-4, atol=1e-4)
    (picture,) = remote(family).decode(z, return_dict=False)
    assert picture.shape == x.shape
    assert_close(picture, local[family].decode(z).sample, rtol=1e-4, atol=1e-4)
    assert_close(remote(family).decode(z[:, :, 0]).sample, picture[:, :, 0], rtol=0, atol=0)


@torch.no_grad()
def test_clips_of_more_frames_are_refused(remote):
    with pytest.raises(ValueError, match="expected one frame, got 5"):
        remote("wan").encode(noise(1, 3, 5, 32, 32))
    with pytest.raises(ValueError, match="expected one frame, got 2"):
        remote("wan").decode(noise(1, 16, 2, 4, 4))


@pytest.mark.parametrize("family", KL)
@torch.no_grad()
def test_the_posterior_draws_what_the_local_one_draws(local, remote, family):
    x = pictures(2)
    expected, found = local[family].encode(x).latent_dist, remote(family).encode(x).latent_dist
    assert type(found) is type(expected)
    assert_close(found.mode(), expected.mode(), rtol=1e-4, atol=1e-4)
    assert_close(found.std, expected.std, rtol=1e-4, atol=1e-4)
    assert_close(found.sample(seeded()), expected.sample(seeded()), rtol=1e-4, atol=1e-4)
    assert (expected.sample(seeded()) - expected.mode()).abs().max() > 0.1
    assert_close(remote(family).encode(x, return_dict=False)[0].mean, found.mean, rtol=0, atol=0)


@pytest.mark.parametrize("family", [*KL, "taesd"])
@torch.no_grad()
def test_decoding_gives_the_network_s_own_floats(local, remote, family):
    z = noise(2, local[family].config.latent_channels, 4, 6) * 3
    expected = local[family].decode(z).sample
    assert_close(remote(family).decode(z).sample, expected, rtol=1e-4, atol=1e-4)
    (found,) = remote(family).decode(z, return_dict=False, generator=seeded())
    assert (found.shape, found.dtype) == (expected.shape, torch.float32)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_tiny_one_gives_latents(local, remote):
    x = pictures()
    expected = local["taesd"].encode(x).latents
    assert_close(remote("taesd").encode(x).latents, expected, rtol=1e-4, atol=1e-4)
    assert_close(remote("taesd").encode(x, return_dict=False)[0], expected, rtol=1e-4, atol=1e-4)
    assert_close(remote("taesd")(x).sample, local["taesd"].decode(expected).sample, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_so_does_dc_ae_by_its_own_name(local, remote):
    x = noise(1, 3, 64, 96).clamp(-1, 1)
    expected = local["sana"].encode(x).latent
    found = remote("sana").encode(x)
    assert_close(found.latent, expected, rtol=1e-4, atol=1e-4)
    assert_close(
        remote("sana").decode(found.latents).sample, local["sana"].decode(expected).sample, rtol=1e-3, atol=1e-3
    )
    assert remote("sana").config.scaling_factor == local["sana"].config.scaling_factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_a_tensor_comes_back_as_it_went(local, remote, dtype):
    x, z = pictures().to(dtype), noise(1, 4, 4, 6).to(dtype)
    moments = remote("sd1").encode(x).latent_dist.parameters
    picture = remote("sd1").decode(z).sample
    assert (moments.dtype, picture.dtype) == (dtype, dtype)
    rounding = max(2 * torch.finfo(dtype).eps, 1e-4)
    assert_close(moments.float(), local["sd1"].encode(x.float()).latent_dist.parameters, rtol=rounding, atol=rounding)
    assert_close(picture.float(), local["sd1"].decode(z.float()).sample, rtol=rounding, atol=rounding)


@torch.no_grad()
def test_there_and_back(local, remote):
    x = pictures()
    assert_close(remote("sd1")(x).sample, local["sd1"](x).sample, rtol=1e-3, atol=1e-3)
    drawn = remote("sd1")(x, sample_posterior=True, generator=seeded()).sample
    assert_close(drawn, local["sd1"](x, sample_posterior=True, generator=seeded()).sample, rtol=1e-3, atol=1e-3)


def test_no_gradient_passes(remote):
    z = noise(1, 4, 4, 4).requires_grad_()
    assert not remote("sd1").decode(z).sample.requires_grad


def test_it_moves_as_a_module_does(url):
    vae = RemoteVAE(url, "sd1-tiny")
    assert (vae.dtype, vae.device) == (torch.float32, torch.device("cpu"))
    assert vae.to("meta", torch.float16) is vae
    assert (vae.dtype, vae.device) == (torch.float16, torch.device("meta"))
    assert vae.num_parameters() == 0
    assert RemoteVAE(url, "sd1-tiny", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_tiling_and_slicing_are_the_service_s_own_business(remote):
    vae = remote("sd1")
    for what in ("tiling", "slicing"):
        getattr(vae, f"enable_{what}")()
        getattr(vae, f"disable_{what}")()
    vae.enable_tiling(tile_sample_min_height=64)


def test_the_key_is_not_in_the_configuration(url):
    vae = RemoteVAE(url, "sd1-tiny", "secret")
    assert "secret" not in str(dict(vae.config))
    assert (vae.config.url, vae.config.model) == (url, "sd1-tiny")


def test_a_model_that_is_not_there_is_said_so_at_once(url):
    with pytest.raises(UnknownModel, match="sd1-tiny"):  # and which there are
        RemoteVAE(url, "nothing")
    with pytest.raises(UnsupportedCheckpoint, match=r"broken cannot be used: truncated"):
        config_of(Model("broken", "broken.pt", error="truncated"))


def test_numbers_per_channel_are_a_mean_and_a_deviation():
    row = Model("x", "x", latent_channels=2, spatial_factor=16, scaling_factor=[0.5, 2.0], shift_factor=[1.0, -1.0])
    config = config_of(row)
    assert (config["latents_mean"], config["latents_std"]) == ([1.0, -1.0], [2.0, 0.5])
    assert (config["scaling_factor"], config["shift_factor"]) == (1.0, 0.0)
    assert 2 ** (len(config["block_out_channels"]) - 1) == 16


def said(caplog):
    """By the client; the service of the tests logs beside it."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("latentd_client")]


def test_what_looks_wrong_is_in_the_log(remote, caplog):
    config_of(Model("x", "x", family="sd1", family_source="config", latent_channels=4, spatial_factor=8))
    remote("sd1").decode(noise(1, 4, 8, 8) * 5)
    assert said(caplog) == []
    remote("sd1").decode(noise(1, 4, 8, 8) * 0.18215)
    config_of(Model("x", "x", family="sd1", family_source="default", latent_channels=4, spatial_factor=8))
    unscaled, guessed = said(caplog)
    assert unscaled.startswith("sd1-tiny: the latent has")
    assert guessed == "x: nothing says of which family it is; the service takes it for sd1"


def test_its_connections_go_with_it(url):
    vae = RemoteVAE(url, "sd1-tiny")
    http = vae._client._http
    del vae
    gc.collect()
    assert http.is_closed


@pytest.mark.parametrize("shape", [(1, 8, 4, 5), (2, 8, 4, 6), (1, 4, 4, 6), (8, 4, 6)])
def test_an_array_of_another_shape_is_not_taken(url, shape):
    row = httpx.get(f"{url}/models/sd1-tiny").json()
    media = {"Content-Type": "application/x-npy"}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=row)
        return httpx.Response(200, headers=media, content=npy(np.zeros(shape, np.float32)))

    vae = RemoteVAE(url, "sd1-tiny", client=Client("http://x", transport=httpx.MockTransport(answer)))
    with pytest.raises(UnexpectedAnswer, match="expected an array of"):
        vae.encode(pictures())
    with pytest.raises(UnexpectedAnswer, match="expected an array of"):
        vae.decode(noise(1, 4, 4, 6))
