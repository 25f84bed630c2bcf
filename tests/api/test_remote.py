"""The client is diffusers' own, unmodified; what it gets is compared with diffusers' networks in this process."""

import io
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLWan, AutoencoderTiny
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.remote_utils import remote_decode, remote_encode
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import Tensor

from app.wire.clips.reels import reel_of
from clients.python.tests.vaes import autoencoder
from tests.service import SIDE, array_of, latent, listening, npy, picture, pixels, serving

LEVELS = {
    "block_out_channels": (32, 32, 32, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
}
NO_QUANT: dict[str, Any] = {"use_quant_conv": False, "use_post_quant_conv": False}
FACTORS: dict[str, tuple[float | None, float | None]] = {
    "sd1": (0.18215, None),
    "sdxl": (0.13025, None),
    "sd3": (1.5305, 0.0609),
    "flux": (0.3611, 0.1159),
    "taesd": (1.0, None),
    "flux2": (None, None),  # its scaling is of packed channels, by statistics of its own
}
PROCESSOR = VaeImageProcessor()


def built(family: str) -> Any:
    """A small random network of diffusers' own."""
    torch.manual_seed(sum(family.encode()))
    scaling, shift = FACTORS[family]
    if family == "taesd":
        blocks: dict[str, Any] = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        return AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1))
    if family == "flux2":
        network = AutoencoderKLFlux2(**LEVELS)
        network.bn.running_mean.normal_()
        network.bn.running_var.uniform_(0.5, 2)
        return network
    if family in ("sd1", "sdxl"):
        return AutoencoderKL(**LEVELS, latent_channels=4, scaling_factor=scaling)
    return AutoencoderKL(**LEVELS, latent_channels=16, scaling_factor=scaling, shift_factor=shift, **NO_QUANT)


@pytest.fixture(scope="module")
def networks() -> dict[str, Any]:
    return {family: built(family).eval().requires_grad_(False) for family in FACTORS}


@pytest.fixture(scope="module")
def wan() -> Any:
    torch.manual_seed(21)
    return AutoencoderKLWan(base_dim=8, num_res_blocks=2)


TODAY = {"qwen": (16, 8), "wan22": (48, 16), "qwen21": (64, 16), "sana": (32, 32), "hunyuan": (64, 32)}
"""(channels, pixels per position) of the latents of families that came after those protocols."""


@pytest.fixture(scope="module")
def today() -> dict[str, Any]:
    return {family: autoencoder(family).requires_grad_(False) for family in TODAY}


@pytest.fixture(scope="module")
def url(networks, wan, today, tmp_path_factory) -> Iterator[str]:
    folder: Path = tmp_path_factory.mktemp("remote")
    for family, network in (networks | today | {"wan": wan}).items():
        network.save_pretrained(folder / "VAE" / family)
    with listening(folder) as (server, port):
        while not server.engine.ready:  # twelve models are not always read before it serves
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/remote"


@pytest.fixture(scope="module")
async def service(models):
    async with serving(models, default_model="kl") as service:
        yield service


def noise(family: str, *, n: int = 1, dtype: torch.dtype = torch.float16, h: int = 4, w: int = 6) -> Tensor:
    channels = {"sd1": 4, "sdxl": 4, "taesd": 4, "flux2": 32}.get(family, 16)
    return torch.randn(n, channels, h, w, generator=torch.Generator().manual_seed(3)).to(dtype)


def scaled(family: str, raw: Tensor) -> Tensor:
    scaling, shift = FACTORS[family]
    return (raw.float() - (shift or 0)) * (scaling or 1)


def unscaled(family: str, latents: Tensor) -> Tensor:
    scaling, shift = FACTORS[family]
    return latents.float() / (scaling or 1) + (shift or 0)


def decoded(network: Any, raw: Tensor) -> Tensor:
    """(N, 3, H, W), about [-1, 1]."""
    with torch.inference_mode():
        picture: Tensor = network.decode(raw.float()).sample
        return picture


def factors(family: str) -> dict[str, float]:
    pairs = zip(("scaling_factor", "shift_factor"), FACTORS[family], strict=True)
    given = {name: value for name, value in pairs if value is not None}
    return given or {"do_scaling": False}


def packed(latents: Tensor) -> Tensor:
    """As the pipelines of FLUX have them."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * w // 2, c * 4)


def preprocessed(*seeds: int, width: int = SIDE, height: int = SIDE) -> Tensor:
    """(N, 3, H, W). Contiguous: of other tensors the client sends the bytes of a copy that it has let go of."""
    images = [Image.fromarray(pixels(width, height, seed)) for seed in seeds]
    return torch.cat([PROCESSOR.preprocess(image) for image in images]).contiguous()


def levels(expected: Tensor) -> np.ndarray:
    """8 bits, as diffusers makes them."""
    found: np.ndarray = PROCESSOR.postprocess(expected, output_type="np")
    return found * 255


# ------------------------------------------------------------------------------------------------ diffusers' own client


@pytest.mark.parametrize("family", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_tensor_comes_back_as_the_network_gives_it(url, networks, family, dtype):
    z = noise(family, n=2, dtype=dtype)
    found = remote_decode(f"{url}/{family}/decode", z, output_type="pt", return_type="pt", **factors(family))
    expected = decoded(networks[family], unscaled(family, z))
    assert found.dtype == torch.float16
    assert found.shape == expected.shape
    assert found.abs().max() > 0.01
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FACTORS)
def test_every_form_of_a_picture(url, networks, family):
    endpoint, z = f"{url}/{family}/decode", noise(family)
    expected = levels(decoded(networks[family], unscaled(family, z)))[0]

    def close(found: Any, most: float) -> None:
        assert np.abs(np.asarray(found).astype(float) - expected).max() <= most

    png = remote_decode(endpoint, z, output_type="pil", image_format="png", **factors(family))
    assert (png.format, png.mode, png.size) == ("png", "RGB", (48, 32))
    close(png, 0.6)
    jpg = remote_decode(endpoint, z, output_type="pil", image_format="jpg", **factors(family))
    assert (jpg.format, jpg.size) == ("jpeg", (48, 32))
    file = io.BytesIO()
    Image.fromarray(expected.round().astype(np.uint8)).save(file, "JPEG", quality=90)
    assert np.abs(np.asarray(jpg).astype(float) - np.asarray(Image.open(file))).mean() < 1
    post = {"output_type": "pt", "partial_postprocess": True}
    eight = remote_decode(endpoint, z, return_type="pt", **post, **factors(family))
    assert (eight.dtype, eight.shape) == (torch.uint8, (1, 32, 48, 3))
    close(eight[0], 0.6)
    close(remote_decode(endpoint, z, return_type="pil", **post, **factors(family)), 0.6)
    by_processor = remote_decode(endpoint, z, PROCESSOR, output_type="pt", return_type="pil", **factors(family))
    close(by_processor, 1.0)
    (unit,) = remote_decode(endpoint, z, PROCESSOR, output_type="pil", **factors(family))
    close(unit, 1.0)


def test_a_client_with_a_processor_gets_pictures_between_0_and_1(url, networks):
    loud = noise("sd1") * 50
    found = remote_decode(
        f"{url}/sd1/decode", loud, PROCESSOR, output_type="pil", return_type="pt", scaling_factor=0.18215
    )
    expected = (decoded(networks["sd1"], unscaled("sd1", loud)) / 2 + 0.5).clamp(0, 1)
    assert (found.shape, found.dtype) == (expected.shape, torch.float16)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
@pytest.mark.filterwarnings("ignore:.*do_scaling.*:FutureWarning")
def test_every_rule_of_scaling(url, networks, family):
    endpoint, z = f"{url}/{family}/decode", noise(family)
    form: dict[str, Any] = {"output_type": "pt", "return_type": "pt"}
    own = remote_decode(endpoint, z, **form)  # do_scaling=True: by the model's own constants
    given = remote_decode(endpoint, z, **form, **factors(family))
    none = remote_decode(endpoint, z, **form, do_scaling=False)
    torch.testing.assert_close(own, given, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(none.float(), decoded(networks[family], z), rtol=2e-3, atol=2e-3)
    assert (own - none).abs().max() > 0.01
    other = remote_decode(endpoint, z, **form, scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(other.float(), decoded(networks[family], z / 0.5 + 0.25), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("h", [4, 10])
def test_packed_and_unpacked_latents_of_flux_are_the_same(url, n, h):
    endpoint, z = f"{url}/flux/decode", noise("flux", n=n, h=h)
    form: dict[str, Any] = {"output_type": "pt", "return_type": "pt", "height": h * 8, "width": 48, **factors("flux")}
    plain = remote_decode(endpoint, z, **form)
    torch.testing.assert_close(remote_decode(endpoint, packed(z), **form), plain)
    assert plain.shape == (n, 3, h * 8, 48)


@pytest.mark.filterwarnings("ignore:.*do_scaling.*:FutureWarning")
def test_flux2_s_latents_as_its_pipelines_have_them(url, networks):
    network, raw = networks["flux2"], noise("flux2", dtype=torch.float32)
    patched = packed(raw).permute(0, 2, 1).reshape(1, 128, 2, 3)
    bn = network.bn
    std = (bn.running_var + network.config.batch_norm_eps).sqrt()
    normal = ((patched - bn.running_mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)).contiguous()
    rows = normal.reshape(1, 128, 6).permute(0, 2, 1).contiguous()
    form: dict[str, Any] = {"output_type": "pt", "return_type": "pt", "height": 32, "width": 48}
    endpoint, expected = f"{url}/flux2/decode", decoded(network, raw)
    for latents, more in (
        (normal, {}),
        (rows, {}),
        (packed(raw), {"do_scaling": False}),
        (raw, {"do_scaling": False}),
    ):
        found = remote_decode(endpoint, latents, **form, **more).float()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", FACTORS)
def test_a_picture_is_encoded_as_the_network_does(url, networks, family):
    image, tensor = Image.fromarray(pixels(96, 64)), preprocessed(0, width=96, height=64)
    with torch.inference_mode():
        found = networks[family].encode(tensor)
        raw = found.latents if family == "taesd" else found.latent_dist.mode()
    for given in (image, tensor, tensor.half()):
        plain = remote_encode(f"{url}/{family}/encode", given)
        assert (plain.dtype, plain.shape) == (torch.float16, (1, raw.shape[1], 8, 12))
        torch.testing.assert_close(plain.float(), raw, rtol=5e-3, atol=5e-3)
        scaling, shift = FACTORS[family]
        by_factors = remote_encode(f"{url}/{family}/encode", given, scaling_factor=scaling, shift_factor=shift)
        torch.testing.assert_close(by_factors.float(), scaled(family, raw), rtol=5e-3, atol=5e-3)


def test_several_pictures_of_one_tensor(url):
    pair = preprocessed(1, 2)
    both = remote_encode(f"{url}/sd1/encode", pair)
    assert both.shape == (2, 4, SIDE // 8, SIDE // 8)
    torch.testing.assert_close(both[1:], remote_encode(f"{url}/sd1/encode", pair[1:]), rtol=1e-3, atol=1e-3)


def test_latents_of_one_frame_come_back_as_pictures_of_one_frame(url, wan):
    z = noise("wan", n=2)[:, :, None]
    expected = decoded(wan, z)
    form = {"do_scaling": False, "output_type": "pt"}
    found = remote_decode(f"{url}/wan/decode", z, return_type="pt", **form)
    assert found.shape == expected.shape == (2, 3, 1, 32, 48)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    frames = remote_decode(f"{url}/wan/decode", z, VideoProcessor(), return_type="pil", **form)
    assert [frame.size for frame in frames] == [(48, 32)]
    packed_too = remote_decode(f"{url}/wan/decode", packed(z[:, :, 0]), height=32, width=48, return_type="pt", **form)
    assert torch.equal(packed_too, found[:, :, 0])
    picture = remote_decode(f"{url}/wan/decode", z[:1], do_scaling=False, image_format="png")
    assert np.abs(np.asarray(picture) - levels(expected[:1, :, 0])[0]).max() <= 1.0


def framed(family: str, tensor: Tensor) -> Tensor:
    """As the networks of clips have pictures."""
    return tensor[:, :, None] if family in ("qwen", "wan22", "qwen21") else tensor


@pytest.mark.parametrize("family", TODAY)
@pytest.mark.filterwarnings("ignore:.*do_scaling.*:FutureWarning")
def test_every_form_of_families_of_today(url, today, family):
    network, endpoint = today[family], f"{url}/{family}/decode"
    channels, factor = TODAY[family]
    z = torch.randn(1, channels, 2, 3, generator=torch.Generator().manual_seed(3))
    expected = decoded(network, framed(family, z)).reshape(1, -1, 2 * factor, 3 * factor)
    found = remote_decode(endpoint, z, output_type="pt", return_type="pt", do_scaling=False)
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)
    png = remote_decode(endpoint, z, image_format="png", do_scaling=False)  # of which the client drops alpha
    assert np.abs(np.asarray(png).astype(float) - levels(expected)[0][..., :3]).max() <= 0.6
    post: dict[str, Any] = {"output_type": "pt", "partial_postprocess": True, "return_type": "pt"}
    eight = remote_decode(endpoint, z, **post, do_scaling=False)
    assert np.abs(eight[0].numpy() - levels(expected)[0]).max() <= 0.6
    config = network.config
    if (scaling := config.get("scaling_factor")) is not None:
        raw = z / scaling + (config.get("shift_factor") or 0)
    else:
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        raw = z * std + mean
    own = remote_decode(endpoint, z, output_type="pt", return_type="pt")  # do_scaling=True
    expected = decoded(network, framed(family, raw)).reshape(own.shape)
    torch.testing.assert_close(own.float(), expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("family", TODAY)
def test_pictures_are_encoded_by_families_of_today(url, today, family):
    network, (channels, factor) = today[family], TODAY[family]
    image = Image.fromarray(pixels(3 * factor, 2 * factor))
    alpha = family == "qwen21"
    tensor = PROCESSOR.preprocess(image)
    given = torch.cat([tensor, torch.ones_like(tensor[:, :1])], 1) if alpha else tensor
    with torch.inference_mode():
        encoded = network.encode(framed(family, given))
    raw = encoded.latent if family == "sana" else encoded.latent_dist.mode()
    found = remote_encode(f"{url}/{family}/encode", image)
    assert found.shape == (1, channels, 2, 3)
    torch.testing.assert_close(found.float(), raw.reshape(found.shape), rtol=5e-3, atol=5e-3)


def test_a_clip_is_a_tensor_of_frames_or_a_film(url, wan):
    z = torch.randn(1, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    asked = {"endpoint": f"{url}/wan/decode", "tensor": z, "do_scaling": False}
    with torch.inference_mode():
        expected = wan.decode(z).sample
    found = remote_decode(**asked, output_type="pt", return_type="pt", partial_postprocess=False)
    assert found.shape == (1, 3, 9, 16, 16)
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=0)
    film = remote_decode(**asked, output_type="mp4", return_type="mp4")
    reel = reel_of(film, max_pixels=1 << 16)
    assert (reel.count, reel.size) == (9, (16, 16))


def test_there_is_no_limit_of_2048(url):
    found = remote_decode(f"{url}/taesd/decode", noise("taesd", h=2, w=264), output_type="pil", do_scaling=False)
    assert found.size == (2112, 16)


def test_the_client_shows_what_was_refused(url):
    with pytest.raises(RuntimeError, match="'error': \"no model"):
        remote_decode(f"{url}/nobody/decode", noise("sd1"), do_scaling=False)
    with pytest.raises(RuntimeError, match="expected a clip"):
        remote_decode(f"{url}/sd1/decode", noise("sd1"), do_scaling=False, output_type="mp4", return_type="mp4")
    with pytest.raises(RuntimeError, match="is for pictures"):
        remote_decode(f"{url}/sd1/decode", noise("sd1")[:, :, None].repeat(1, 1, 2, 1, 1), do_scaling=False)
    with pytest.raises(RuntimeError, match="takes raw latents of 4 channels"):
        remote_decode(f"{url}/sd1/decode", noise("flux"), do_scaling=False)


# ------------------------------------------------------------------------------------------- what else clients may send


def said(array: np.ndarray, **more: object) -> Any:
    pairs = {"output_type": "pt", "dtype": array.dtype.name} | more
    return [("shape", side) for side in array.shape] + [(name, str(value)) for name, value in pairs.items()]


async def tensor(service, array: np.ndarray, **more: object) -> np.ndarray:
    params = said(array, **more)
    answer = await service.post("/remote/kl/decode", content=array.tobytes(), params=params)
    return tensor_of(answer)


def tensor_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "tensor/binary"
    shape, dtype = json.loads(answer.headers["shape"]), answer.headers["dtype"]
    return np.frombuffer(answer.content, dtype).reshape(shape)


def error_of(answer: httpx.Response, status: int) -> str:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json"), answer.text
    assert list(answer.json()) == ["error"]
    assert answer.headers["X-Request-Id"]
    text: str = answer.json()["error"]
    return text


async def test_latents_without_their_batch_and_shapes_in_one_piece(service):
    z = latent()
    expected = await tensor(service, z)
    assert (expected.shape, expected.dtype) == ((1, 3, SIDE, SIDE), np.dtype(np.float16))
    np.testing.assert_array_equal(await tensor(service, z[0]), expected)
    # height and width beside unpacked latents, as some nodes always send them
    np.testing.assert_array_equal(await tensor(service, z[0], height=SIDE, width=SIDE), expected)
    for text in ("1,4,4,4", "[1, 4, 4, 4]"):
        params = {"shape": text, "dtype": "float16", "output_type": "pt"}
        answer = await service.post("/remote/kl/decode", content=z.tobytes(), params=params)
        np.testing.assert_array_equal(tensor_of(answer), expected)


async def test_packed_latents_without_their_batch(service):
    z = latent(1, 4, 4, 6)
    rows = packed(torch.tensor(z)).numpy()
    found = await tensor(service, rows[0], height=32, width=48)
    np.testing.assert_array_equal(found, await tensor(service, z))
    params = said(rows)
    answer = await service.post("/remote/kl/decode", content=rows.tobytes(), params=params)
    assert "height and width" in error_of(answer, 422)
    params = said(rows, height=32, width=64)
    answer = await service.post("/remote/kl/decode", content=rows.tobytes(), params=params)
    assert "64x32" in error_of(answer, 422)


async def test_unknown_parameters_are_nobodys_business(service):
    z = latent()
    more = {"input_tensor_type": "binary", "output_tensor_type": "binary", "do_scaling": "False"}
    np.testing.assert_array_equal(await tensor(service, z, **more), await tensor(service, z))


async def test_base64_of_older_clients(service):
    z = latent()
    expected = await tensor(service, z, do_scaling="True")
    headers = {"Content-Type": "tensor/base64", "Accept": "tensor/base64"}
    inputs = b64encode(z.tobytes()).decode()
    in_query = said(z, do_scaling="True")
    in_body = {"shape": list(z.shape), "dtype": "float16", "output_type": "pt", "do_scaling": True}
    for params, content in ((in_query, {"inputs": inputs}), ([], {"inputs": inputs, "parameters": in_body})):
        body = json.dumps(content)
        answer = await service.post("/remote/kl/decode", content=body, params=params, headers=headers)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["parameters"] == {"shape": [1, 3, SIDE, SIDE], "dtype": "float16"}
        assert b64decode(found["inputs"]) == expected.tobytes()
        assert json.loads(answer.headers["shape"]) == [1, 3, SIDE, SIDE]
    image = {"output_type": "pil", "image_format": "jpg", "shape": z.shape, "dtype": "float16"}
    body = json.dumps({"inputs": inputs})
    answer = await service.post(
        "/remote/kl/decode", content=body, params=image, headers=headers | {"Accept": "image/*"}
    )
    assert Image.open(io.BytesIO(answer.content)).format == "JPEG"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no json", "expected JSON"),
        (b"{}", "expected JSON"),
        (b'{"inputs": 5}', "expected JSON"),
        (b'["inputs"]', "expected JSON"),
        (b'{"inputs": "a"}', "expected JSON"),
        (b'{"inputs": "", "parameters": 5}', "expected JSON"),
        (b"[" * 100_000, "parts"),
    ],
)
async def test_a_body_that_is_no_such_json_is_malformed(service, body, words):
    answer = await service.post("/remote/kl/decode", content=body, headers={"Content-Type": "tensor/base64"})
    assert words in error_of(answer, 400)


async def test_parameters_in_json_are_looked_at_as_those_of_the_query(service):
    body = json.dumps({"inputs": "", "parameters": {"dtype": "float8", "scaling_factor": 0}})
    answer = await service.post("/remote/kl/decode", content=body, headers={"Content-Type": "tensor/base64"})
    text = error_of(answer, 422)
    assert "dtype" in text
    assert "scaling_factor" in text


@pytest.mark.parametrize(
    ("array", "more", "status", "words"),
    [
        (latent()[0, 0], {}, 422, "(4, 4)"),
        (latent().reshape(-1), {}, 422, "(64,)"),
        (latent(), {"dtype": "uint8"}, 422, "got uint8"),
        (latent(), {"dtype": "float32"}, 400, "256 bytes of data, 128 are there"),
        (latent(), {"dtype": "int8"}, 422, "dtype"),
        (latent(), {"scaling_factor": 0}, 422, "scaling_factor"),
        (latent(), {"scaling_factor": "nan"}, 422, "scaling_factor"),
        (latent(), {"scaling_factor": 1e-300}, 422, "infinite"),
        (latent(), {"shift_factor": 1e300}, 422, "infinite"),
        (latent(), {"output_type": "np"}, 422, "output_type"),
        (latent(), {"output_type": "mp4"}, 422, "expected a clip"),
        (latent() * np.float16(np.inf), {}, 422, "NaN or infinite"),
        (np.zeros((0, 4, 4, 4), np.float16), {}, 422, "no dimension of 0"),
        (latent(2, 4, 4, 4), {"output_type": "pil"}, 422, "output_type=pt"),
        (latent(1, 5, 4, 4), {}, 422, "4 channels"),
        (latent(1, 4, 2, 4, 4), {}, 422, "is for pictures"),
        (latent(2, 4, 2, 4, 4), {}, 422, "expected one clip"),
    ],
)
async def test_what_does_not_fit_is_refused_with_an_error_in_json(service, array, more, status, words):
    answer = await service.post("/remote/kl/decode", content=array.tobytes(), params=said(array, **more))
    assert words in error_of(answer, status)


@pytest.mark.parametrize("params", [{}, {"shape": "1,4,4,4"}, {"dtype": "float16"}])
async def test_a_tensor_needs_a_shape_and_a_dtype(service, params):
    answer = await service.post("/remote/kl/decode", content=latent().tobytes(), params=params)
    assert "shape" in error_of(answer, 422)


async def test_the_type_of_a_picture_follows_the_format_and_then_accept(service):
    z = latent()
    for query, accept, kind in (
        ("png", "image/png", "PNG"),
        ("jpg", "image/jpeg", "JPEG"),
        (None, "image/png", "PNG"),
        (None, "*/*", "JPEG"),
    ):
        params = said(z, output_type="pil") + ([("image_format", query)] if query else [])
        answer = await service.post("/remote/kl/decode", content=z.tobytes(), params=params, headers={"Accept": accept})
        assert Image.open(io.BytesIO(answer.content)).format == kind
        assert answer.headers["content-type"] == f"image/{kind.lower()}"


async def test_the_headers_say_what_happened_as_of_the_own_routes(service):
    z = latent()
    params = said(z, do_scaling="True")
    answer = await service.post("/remote/kl/decode", content=z.tobytes(), params=params)
    own = await service.post("/decode?dtype=float16", content=npy(z))
    for name in ("X-Model", "X-Model-SHA256", "X-Plan", "X-Latents", "X-Image-Size"):
        assert answer.headers[name] == own.headers[name]
    np.testing.assert_array_equal(tensor_of(answer).transpose(0, 2, 3, 1), np.load(io.BytesIO(own.content)))
    far = await service.post("/remote/kl/decode", content=(z * 20).tobytes(), params=params)
    assert "standard deviation" in far.headers["X-Warning"]


async def test_encode_needs_no_content_type_and_crops_to_whole_positions(service):
    request = service.client.build_request("POST", "/remote/kl/encode", content=picture(35, 33))
    assert "content-type" not in request.headers
    answer = await service.client.send(request)
    assert tensor_of(answer).shape == (1, 4, 4, 4)
    assert (answer.headers["X-Image-Size"], answer.headers["X-Image-Fit"]) == ("35x33", "crop")
    own = await service.post("/encode?latents=raw&fit=crop", content=picture(35, 33))
    np.testing.assert_array_equal(tensor_of(answer), np.load(io.BytesIO(own.content)))


async def test_encode_in_base64(service):
    tensor = pixels().transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
    parameters = {"shape": tensor.shape, "dtype": "float32"}
    body = json.dumps({"inputs": b64encode(tensor.tobytes()).decode(), "parameters": parameters})
    headers = {"Content-Type": "tensor/base64", "Accept": "tensor/base64"}
    found = (await service.post("/remote/kl/encode", content=body, headers=headers)).json()
    expected = await service.post("/remote/kl/encode", content=tensor.tobytes(), params=parameters)
    assert b64decode(found["inputs"]) == expected.content


@pytest.mark.parametrize(
    ("body", "params", "status", "words"),
    [
        (b"no picture", {}, 415, "PNG"),
        (picture()[:-30], {}, 400, "truncated"),
        (bytes(12), {"shape": "1,3,1,1", "dtype": "float32"}, 422, "8x8"),
        (bytes(12), {"shape": "1,3,1,2", "dtype": "float32"}, 400, "bytes of data"),
        (bytes(16), {"shape": "1,4,1,1", "dtype": "float32"}, 422, "expected 3 channels, got 4"),
        (bytes(20), {"shape": "1,5,1,1", "dtype": "float32"}, 422, "expected a shape"),
        (bytes(12), {"shape": "1,3,1,1"}, 422, "dtype"),
        (picture(), {"scaling_factor": 1e38}, 500, "float16"),
    ],
)
async def test_what_cannot_be_encoded_is_refused_with_an_error_in_json(service, body, params, status, words):
    assert words in error_of(await service.post("/remote/kl/encode", content=body, params=params), status)


async def test_keys_are_needed_there_as_anywhere(models):
    async with serving(models, api_keys="secret") as service:
        for path in ("/remote/kl/decode", "/remote/kl/encode"):
            answer = await service.post(path)
            assert "key" in error_of(answer, 401)
            assert "Basic" in answer.headers["WWW-Authenticate"]
            assert "not known" in error_of(await service.post(path, headers={"Authorization": "Bearer no"}), 403)
            for allowed in ({"headers": {"Authorization": "Bearer secret"}}, {"auth": ("anyone", "secret")}):
                error_of(await service.post(path, **allowed), 422 if path.endswith("decode") else 415)


async def test_limits_and_queue_are_those_of_the_other_routes(models):
    z = latent()
    async with serving(models, max_pixels=SIDE * SIDE - 1, max_body_bytes=200) as service:
        answer = await service.post("/remote/kl/decode", content=z.tobytes(), params=said(z))
        assert "1024 pixels" in error_of(answer, 413)
        assert "200" in error_of(await service.post("/remote/kl/encode", content=bytes(201)), 413)
        service.engine.draining = True
        z = latent(1, 4, 1, 1)
        answer = await service.post("/remote/kl/decode", content=z.tobytes(), params=said(z))
        assert "shutting down" in error_of(answer, 503)
        assert answer.headers["Retry-After"]
    async with serving(models, queue_size=1, queue_pixels=SIDE * SIDE) as service:
        task = await service.engine.resolve("kl")
        assert task.name == "kl"
        service.engine.workers[0].batcher.admit(1, 1, None, 0.0)
        answer = await service.post("/remote/kl/decode", content=latent().tobytes(), params=said(latent()))
        assert "queue is full" in error_of(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1


async def test_all_below_remote_fails_in_their_form(service):
    assert "nobody" in error_of(await service.post("/remote/nobody/decode"), 404)
    error_of(await service.post("/remote/kl/predict"), 404)
    error_of(await service.get("/remote/kl/decode"), 405)


async def test_a_bug_is_an_error_in_their_form_too(service, monkeypatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("app.api.remote.latent_layout", broken)
    answer = await service.post("/remote/kl/decode", content=latent().tobytes(), params=said(latent()))
    assert "request_id" in error_of(answer, 500)


async def test_requests_are_logged_and_counted_as_the_operations_that_they_are(service, caplog):
    before = {op: service.count("vae_requests_total", op=op, model="kl", status="200") for op in ("encode", "decode")}
    with caplog.at_level("INFO", "app.access"):
        await tensor(service, latent())
        await service.post("/remote/kl/encode", content=picture())
        await service.post("/remote/kl/encode", content=b"no picture")
    for op, count in before.items():
        assert service.count("vae_requests_total", op=op, model="kl", status="200") == count + 1
    lines = [record.getMessage() for record in caplog.records if record.name == "app.access"]
    assert "POST /remote/kl/decode 200" in lines[0]
    assert "model=kl" in lines[0]
    assert "unsupported_media: " in lines[2]


# --------------------------------------------------------------------------------------------------------------- alpha


async def test_a_model_with_alpha_answers_four_channels(rgba):
    z = np.random.default_rng(0).standard_normal((1, 16, 4, 4)).astype(np.float32)
    async with serving(rgba) as service:

        async def post(content: bytes, op: str = "decode", **query: Any) -> httpx.Response:
            answer = await service.post(f"/remote/layered/{op}", params=query, content=content)
            assert answer.status_code == 200, answer.text
            return answer

        tensor: dict[str, Any] = {"shape": [1, 16, 4, 4], "dtype": "float32", "do_scaling": False}
        found = await post(z.tobytes(), **tensor, output_type="pt")
        assert found.headers["shape"] == "[1, 4, 32, 32]"
        png = await post(z.tobytes(), **tensor, image_format="png")
        assert Image.open(io.BytesIO(png.content)).mode == "RGBA"
        jpeg = await post(z.tobytes(), **tensor, image_format="jpg")
        assert Image.open(io.BytesIO(jpeg.content)).mode == "RGB"
        assert "has no alpha" in jpeg.headers["x-warning"]
        array = np.dstack([pixels(), pixels()[..., :1]])
        own = await service.post("/encode?latents=raw", content=npy(array))
        encoded = await post(array.tobytes(), "encode", shape=[1, SIDE, SIDE, 4], dtype="uint8")
        assert encoded.content == array_of(own).tobytes()
