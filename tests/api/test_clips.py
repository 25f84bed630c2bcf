"""Clips through HTTP: frames as they are done, slow readers, cuts in the middle, and what is refused."""

import http.client
import io
import socket
import sys
import time
import zipfile
from collections import deque
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load as load_safetensors
from safetensors.torch import save_file

from app.engine import compute
from app.errors import ServiceError
from app.execution.slices import Sliced
from app.store.checkpoint import load_autoencoder
from app.wire import clips
from app.wire.arrays.tensors import write_safetensors
from app.wire.clips.reels import reel_of
from tests.service import listening, npy, serving, until
from tests.service import refused as problem_of
from tests.store.weights import state_of

NPY, SAFETENSORS, ZIP = "application/x-npy", "application/x-safetensors", "application/zip"
APNG, WEBP, MULTIPART = "image/apng", "image/webp", "multipart/mixed"
MP4, WEBM, MKV = "video/mp4", "video/webm", "video/x-matroska"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`clips` (wan21) and `kl` (sd1)."""
    folder = tmp_path_factory.mktemp("clips") / "VAE"
    folder.mkdir()
    torch.manual_seed(0)
    save_file({key: value.contiguous() for key, value in state_of("wan21").items()}, folder / "clips.safetensors")
    save_file(state_of("sd1"), folder / "kl.safetensors")
    return folder.parent


@pytest.fixture(scope="module")
async def service(folder):
    async with serving(folder, default_model="clips") as service:
        yield service


def latents(frames=3, height=4, width=5):
    return np.random.default_rng(0).standard_normal((1, 16, frames, height, width)).astype(np.float32)


def pixels(frames=9, height=32, width=40):
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
async def network(service):
    checkpoint = (await service.engine.resolve("clips")).for_clips()
    return load_autoencoder(checkpoint, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def decoded(network):
    """The frames of `latents()`, raw, whole and not through the service."""
    with torch.inference_mode():
        frames = network.decode(Sliced(deque()), torch.from_numpy(latents()[0]).transpose(0, 1))
    return ((frames.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).numpy()


async def refused(asked, status, code, words):
    assert words in problem_of(await asked, status, code)


def frames_of(answer):
    kind = answer.headers["content-type"]
    if kind == NPY:
        return np.load(io.BytesIO(answer.content))
    if kind == ZIP:
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            pictures = [archive.read(name) for name in archive.namelist()]
    elif kind in (MP4, WEBM, MKV):
        reel = reel_of(answer.content, max_pixels=1 << 20)
        return np.stack(reel.read(reel.count, (0, 0, 0)))
    elif kind in (APNG, WEBP):
        image: Any = Image.open(io.BytesIO(answer.content))
        found = []
        for index in range(image.n_frames):
            image.seek(index)
            found.append(np.array(image))
        return np.stack(found)
    else:
        boundary = kind.partition("boundary=")[2].encode()
        parts = answer.content.split(b"--" + boundary)[1:-1]
        pictures = [part.partition(b"\r\n\r\n")[2] for part in parts]
    return np.stack([np.array(Image.open(io.BytesIO(picture))) for picture in pictures])


@pytest.mark.parametrize("media", [NPY, ZIP, APNG, MULTIPART, WEBP, MP4, WEBM, MKV])
async def test_a_clip_is_answered_frame_by_frame(service, decoded, media):
    lossless = "&lossless=true" if media in (WEBP, MP4, WEBM) else ""
    answer = await service.post(f"/decode?latents=raw{lossless}", content=npy(latents()), headers={"Accept": media})
    assert answer.status_code == 200, answer.text
    found = frames_of(answer)
    assert found.shape == (9, 32, 40, 3)
    assert np.abs(found.astype(float) - decoded).max() <= 1
    headers = answer.headers
    assert (headers["X-Frames"], headers["X-Image-Size"], headers["X-Plan"]) == ("9", "40x32", "fp32/whole")
    assert (headers["X-Model"], headers["X-Latents"], headers["X-Latents-Family"]) == ("clips", "raw", "wan21")


async def test_other_files_of_the_same_clip(service, decoded):
    for body in (npy(latents()[0]), write_safetensors(latents(), {"convention": "raw", "family": "wan21"})):
        answer = await service.post("/decode?latents=raw", content=body, headers={"Accept": NPY})
        assert np.abs(frames_of(answer).astype(float) - decoded).max() <= 1
    picture = await service.post("/decode?latents=raw", content=npy(latents()[:, :, :1]), headers={"Accept": NPY})
    assert np.abs(np.load(io.BytesIO(picture.content)).astype(float) - decoded[:1]).max() <= 1


async def test_sixteen_latents_of_sixteen_channels_are_pictures_and_it_is_said(service):
    answer = await service.post("/decode", content=npy(latents(16)[0]), headers={"Accept": NPY})
    assert np.load(io.BytesIO(answer.content)).shape == (16, 32, 40, 3)
    assert "(1, C, T, h, w)" in answer.headers["X-Warning"]
    clip = await service.post("/decode", content=npy(latents(16)), headers={"Accept": NPY})
    assert np.load(io.BytesIO(clip.content)).shape == (61, 32, 40, 3)


async def test_floats_sizes_and_depths(service, decoded):
    answer = await service.post("/decode?latents=raw&dtype=float32&size=37x30", content=npy(latents()))
    found = np.load(io.BytesIO(answer.content))
    assert (found.shape, found.dtype) == ((9, 30, 37, 3), np.float32)
    assert np.abs((found + 1) * 127.5 - decoded[:, :30, :37]).max() <= 1
    deep = await service.post("/decode?latents=raw&bits=16", content=npy(latents()), headers={"Accept": ZIP})
    with zipfile.ZipFile(io.BytesIO(deep.content)) as archive:
        assert archive.read("0000.png")[24] == 16


@pytest.mark.parametrize("media", [NPY, SAFETENSORS])
async def test_frames_become_latents(service, network, media):
    clip = pixels()
    query = "/encode?latents=raw&frames=error&dtype=float32"
    answer = await service.post(query, content=npy(clip), headers={"Accept": media})
    assert answer.status_code == 200, answer.text
    found = np.load(io.BytesIO(answer.content)) if media == NPY else load_safetensors(answer.content)["latents"]
    with torch.inference_mode():
        x = torch.from_numpy(clip).permute(0, 3, 1, 2).float() / 127.5 - 1
        mean = network.encode(Sliced(deque()), x)[:, :16].transpose(0, 1)[None].numpy()
    np.testing.assert_allclose(found, mean, atol=1e-5 * np.ptp(mean))
    assert answer.headers["X-Frames"] == "9"
    back = await service.post("/decode?latents=raw", content=answer.content, headers={"Accept": NPY})
    assert np.load(io.BytesIO(back.content)).shape == clip.shape


@pytest.mark.parametrize("media", [ZIP, APNG, WEBP, MP4, WEBM, MKV])
async def test_what_decode_answers_encode_takes(service, media):
    lossless = "?lossless=true" if media in (WEBP, MP4, WEBM) else ""
    film = await service.post(f"/decode{lossless}", content=npy(latents()), headers={"Accept": media})
    frames = frames_of(film)
    rule = "" if media in (MP4, WEBM, MKV) else "frames=error&"
    found = await service.post(f"/encode?{rule}dtype=float32", content=film.content)
    same = await service.post("/encode?frames=error&dtype=float32", content=npy(frames))
    np.testing.assert_array_equal(np.load(io.BytesIO(found.content)), np.load(io.BytesIO(same.content)))


async def test_bands_and_slices_give_the_same_frames(service, decoded):
    answer = await service.post("/decode?latents=raw&tiling=always", content=npy(latents()), headers={"Accept": NPY})
    assert answer.headers["X-Plan"] == "fp32/strips"
    assert np.abs(frames_of(answer).astype(float) - decoded).max() <= 1


async def test_without_the_extra_video_is_refused_and_the_rest_is_there(service, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.delitem(sys.modules, "app.wire.clips.video", raising=False)
    monkeypatch.delattr(clips, "video", raising=False)
    asked = service.post("/decode", content=npy(latents()), headers={"Accept": MP4})
    await refused(asked, 406, "not_acceptable", "latentd[video]")
    await refused(service.post("/encode", content=b"\0\0\0\x20ftypisom"), 415, "unsupported_media", "latentd[video]")


async def test_frame_counts_that_are_no_whole_latents(service):
    query = "/encode?dtype=float32&latents=raw&frames="
    clip = pixels(7)
    await refused(service.post(f"{query}error", content=npy(clip)), 422, "invalid_image", "as 5 or 9")
    trimmed = await service.post(f"{query}trim", content=npy(clip))
    padded = await service.post(f"{query}pad", content=npy(clip))
    longer = np.concatenate((clip, clip[-1:], clip[-1:]))
    for answer, same, count in ((trimmed, clip[:5], "5"), (padded, longer, "9")):
        whole = await service.post(f"{query}error", content=npy(same))
        assert answer.headers["X-Frames"] == count
        np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), np.load(io.BytesIO(whole.content)))


async def test_odd_sizes_are_padded_and_come_back(service):
    encoded = await service.post("/encode?frames=pad", content=npy(pixels(5, 30, 37)), headers={"Accept": SAFETENSORS})
    assert load_safetensors(encoded.content)["latents"].shape == (1, 16, 2, 4, 5)
    decoded = await service.post("/decode", content=encoded.content, headers={"Accept": NPY})
    assert np.load(io.BytesIO(decoded.content)).shape == (5, 30, 37, 3)


async def test_what_is_refused(service):
    clip, two = npy(latents()), npy(np.concatenate([latents(), latents()]))
    await refused(service.post("/decode?model=kl", content=clip), 422, "invalid_parameter", "for pictures")
    await refused(service.post("/decode", content=two), 422, "invalid_latent", "one clip")
    await refused(service.post("/decode?preview=true", content=clip), 422, "invalid_latent", "one frame")
    await refused(service.post("/decode?quality=5", content=clip), 422, "invalid_parameter", "lossless=true")
    await refused(service.post("/decode?fps=8", content=clip), 422, "invalid_parameter", "fps is for what moves")
    await refused(service.post("/decode?lossless=true", content=clip), 422, "invalid_parameter", "always is")
    picture = npy(latents(1))
    await refused(service.post("/decode?lossless=true", content=picture), 422, "invalid_parameter", "for clips")
    odd = service.post("/decode?size=37x30", content=clip, headers={"Accept": MP4})
    await refused(odd, 406, "not_acceptable", "even sides, the frames have 37x30")
    await refused(service.post("/decode?fps=8", content=npy(latents(1))), 422, "invalid_parameter", "for clips")
    jpeg = service.post("/decode", content=clip, headers={"Accept": "image/jpeg"})
    await refused(jpeg, 406, "not_acceptable", "multipart/mixed")
    broken = latents()
    broken[0, 0, 1, 0, 0] = np.nan
    await refused(service.post("/decode", content=npy(broken)), 422, "invalid_latent", "NaN")
    await refused(service.post("/encode?frames=pad", content=b"\x89PNG\r\n\x1a\n"), 400, "malformed_body", "PNG")
    await refused(service.post("/encode?frames=pad&model=kl", content=npy(pixels())), 422, "invalid_parameter", "pict")
    sample = service.post("/encode?frames=pad&posterior=sample", content=npy(pixels()))
    await refused(sample, 422, "invalid_parameter", "posterior=sample")


async def test_limits_count_frames(folder):
    async with serving(folder, default_model="clips", queue_pixels=6 * 32 * 40, max_pixels=6 * 32 * 40) as service:
        await refused(service.post("/decode", content=npy(latents())), 413, "too_large", "9 frames of 40x32")
        await refused(service.post("/encode?frames=error", content=npy(pixels())), 413, "too_large", "9 frames")
        assert (await service.post("/decode", content=npy(latents(2)), headers={"Accept": NPY})).status_code == 200


def asked(port, body, accept=NPY, **headers):
    """A connection whose answer's head is there."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/decode?latents=raw", body, {"Accept": accept, **headers})
    return connection, connection.getresponse()


class Gate:
    """Stands before `compute.forward_slice`: counts, and fails where a test wants it."""

    def __init__(self, monkeypatch):
        self.slices = 0
        self.fails_at = None
        self._run = compute.forward_slice
        monkeypatch.setattr(compute, "forward_slice", self)

    def __call__(self, *args):
        self.slices += 1
        if self.slices == self.fails_at:
            raise ServiceError("broken on purpose")
        return self._run(*args)


@pytest.mark.parametrize("media", [NPY, ZIP, APNG, MULTIPART])
def test_an_error_in_the_middle_breaks_the_answer(folder, monkeypatch, media):
    gate = Gate(monkeypatch)
    gate.fails_at = 3
    with listening(folder, default_model="clips") as (_, port):
        connection, answer = asked(port, npy(latents(4)), media)
        with closing(connection):
            assert (answer.status, answer.headers["X-Frames"]) == (200, "13")
            with pytest.raises((http.client.IncompleteRead, ConnectionError)):
                answer.read()


def test_a_reader_that_takes_nothing_holds_the_decoder_and_one_that_leaves_ends_it(folder, monkeypatch):
    gate = Gate(monkeypatch)
    length = 40
    with listening(folder, default_model="clips") as (_, port):
        connection, answer = asked(port, npy(latents(length, 32, 32)))  # 25 MB of frames
        assert answer.status == 200
        answer.read(1 << 16)
        before = -1
        while before != gate.slices:
            before = gate.slices
            time.sleep(1)
        assert gate.slices < length, "the socket's buffers are full, and nothing is decoded for nobody"
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        answer.close()
        connection.close()
        connection, answer = asked(port, npy(latents(2)))
        with closing(connection):
            assert len(answer.read()) > 5 * 32 * 40 * 3
        assert gate.slices < length


async def test_nothing_is_left_of_a_clip(service):
    await service.post("/decode", content=npy(latents()), headers={"Accept": NPY})
    worker, context = service.engine.workers[0], service.app.state.context
    await until(lambda: service.engine.open_requests == 0)
    assert (worker.batcher.items, worker.batcher.pixels, context.room.used) == (0, 0, 0)
    assert sum(clip.held for clip in worker.cache.clips) == 0
