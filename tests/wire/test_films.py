"""Films are what other libraries take them for, byte for byte what came in, and visibly cut where they are cut."""

import io
import zipfile
from email import message_from_bytes
from email.policy import HTTP
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.wire.clips.films import BOUNDARY, FILMS, FilmSpec

NPY, ZIP, APNG, MULTIPART = "application/x-npy", "application/zip", "image/apng", "multipart/mixed"
WEBP = "image/webp"


def frames(count=5, channels=3, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, channels)).astype(dtype)


def pieces(media, film, fps=16):
    writer = FILMS[media](FilmSpec(len(film), fps, lossless=True))
    return [writer.add(film[:1]), writer.add(film[1:4]), writer.add(film[4:]), writer.end()]


def opened(png):
    return np.array(Image.open(io.BytesIO(png)))


def read(media, body):
    if media == NPY:
        return np.load(io.BytesIO(body))
    if media == ZIP:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            assert archive.testzip() is None
            assert archive.namelist() == [f"{index:04}.png" for index in range(len(archive.namelist()))]
            assert not any(entry.flag_bits for entry in archive.infolist()), "sizes stand before the data"
            return np.stack([opened(archive.read(name)) for name in archive.namelist()])
    if media in (APNG, WEBP):
        image: Any = Image.open(io.BytesIO(body))
        found = []
        for index in range(image.n_frames):
            image.seek(index)
            found.append(np.array(image))
        return np.stack(found)
    head = f"Content-Type: {media}; boundary={BOUNDARY}\r\n\r\n".encode()
    message = message_from_bytes(head + body, policy=HTTP)
    return np.stack([opened(part.get_payload(decode=True)) for part in message.iter_parts()])


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("media", FILMS)
def test_what_comes_out_is_what_went_in(media, channels):
    film = frames(channels=channels)
    assert np.array_equal(read(media, b"".join(pieces(media, film))), film)


@pytest.mark.parametrize("media", FILMS)
def test_frames_are_there_before_the_next_ones_are_made(media):
    film = frames()
    parts = pieces(media, film)
    if media != WEBP:  # which begins with its length
        assert all(len(part) > film[0].size // 2 for part in parts[:3])
    alone = FILMS[media](FilmSpec(1, 16, lossless=True))
    assert np.array_equal(read(media, alone.add(film[:1]) + alone.end()), film[:1])


def test_floats_are_kept_in_an_array():
    film = frames(dtype=np.float32)
    found = np.load(io.BytesIO(b"".join(pieces(NPY, film))))
    assert found.dtype == np.float32
    assert np.array_equal(found, film)


@pytest.mark.parametrize(("media", "milliseconds"), [(APNG, [1000 / 24] * 5), (WEBP, [42, 41, 42, 42, 41])])
def test_a_film_says_how_fast_it_is(media, milliseconds):
    image: Any = Image.open(io.BytesIO(b"".join(pieces(media, frames(), fps=24))))
    found = []
    for index in range(image.n_frames):
        image.seek(index)
        image.load()
        found.append(image.info["duration"])
    assert image.info["loop"] == 0
    assert found == pytest.approx(milliseconds)


def test_a_webp_with_loss_is_smaller():
    film = np.repeat(np.repeat(frames(), 8, axis=1), 8, axis=2)
    exact, lossy = (FILMS[WEBP](FilmSpec(5, 16, lossless)) for lossless in (True, False))
    exact.add(film), lossy.add(film)
    found = read(WEBP, lossy.end())
    assert len(exact.end()) > 0
    assert np.abs(found.astype(int) - film).mean() < 8


@pytest.mark.parametrize("media", FILMS)
def test_a_film_that_is_cut_looks_cut(media):
    film = frames()
    parts = b"".join(pieces(media, film)[:2])
    if media == MULTIPART:
        assert not parts.endswith(f"--{BOUNDARY}--\r\n".encode())
        return
    with pytest.raises((ValueError, zipfile.BadZipFile, SyntaxError, EOFError, OSError)):
        assert len(read(media, parts)) == len(film), "fewer frames than were said"
