"""Clips come in as they lie, whatever they lie in, and nothing of a wrong one passes for a frame."""

import io
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from app.errors import InvalidImage, MalformedBody, TooLarge, UnsupportedMedia
from app.wire.arrays import npz
from app.wire.arrays.npy import write_npy
from app.wire.clips.films import FILMS, FilmSpec
from app.wire.clips.reels import is_video, reel_of
from app.wire.png import write_png

WHITE = (255, 255, 255)


def frames(count=5, channels=3):
    return np.random.default_rng(0).integers(0, 256, (count, 6, 8, channels), np.uint8)


def film(media, clip):
    writer = FILMS[media](FilmSpec(len(clip), 16, lossless=True))
    return writer.add(clip) + writer.end()


def reel(body, max_pixels=1 << 16):
    return reel_of(body, max_pixels=max_pixels)


@pytest.mark.parametrize("media", ["application/x-npy", "application/zip", "image/apng", "image/webp"])
def test_what_films_are_is_read_in_pieces(media):
    clip = frames()
    found = reel(film(media, clip))
    assert (found.size, found.count, found.alpha) == ((8, 6), 5, False)
    assert found.work >= clip[0].nbytes
    parts = [found.read(count, WHITE) for count in (1, 4)]
    assert np.array_equal(np.stack([frame for part in parts for frame in part]), clip)
    found.close()


@pytest.mark.parametrize("media", ["application/zip", "image/apng", "image/webp"])
def test_alpha_is_kept_or_laid_over_the_background(media):
    clip = frames(channels=4)
    assert np.array_equal(np.stack(reel(film(media, clip)).read(5, None)), clip)
    over = np.stack(reel(film(media, clip)).read(5, (0, 0, 0)))
    expected = clip[..., :3].astype(int) * clip[..., 3:] / 255
    assert over.shape == (5, 6, 8, 3)
    assert np.abs(over - expected).max() <= 1


def test_floats_are_frames_of_their_own():
    clip = np.random.default_rng(0).uniform(-1, 1, (5, 3, 6, 8)).astype(np.float32)
    found = reel(write_npy(clip))
    assert np.array_equal(np.stack(found.read(1, WHITE) + found.read(4, WHITE)), clip.transpose(0, 2, 3, 1))


def test_an_animation_s_first_picture_may_be_none_of_its_frames():
    clip, file = frames(4), io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in clip]
    first.save(file, "PNG", save_all=True, append_images=rest, default_image=True)
    found = reel(file.getvalue())
    assert np.array_equal(np.stack(found.read(found.count, WHITE)), clip[1:])


def zipped(pictures):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, picture in pictures.items():
            archive.writestr(name, picture)
    return file.getvalue()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_a_zip_is_in_the_order_of_its_numbers():
    clip = frames(11)
    found = reel(zipped({f"{index}.png": write_png(clip[index]) for index in reversed(range(11))}))
    assert np.array_equal(np.stack(found.read(11, WHITE)), clip)


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (b"GIF89a", UnsupportedMedia, "got GIF"),
        (zipped({"0.png": write_png(frames()[0]), "1.png": write_png(frames()[0][:4])}), InvalidImage, "one size"),
        (zipped({"0.txt": b"0"}), InvalidImage, "only .png files"),
        (zipped({}), InvalidImage, "empty"),
        (zipped({"0.png": bytes(1 << 21)}), TooLarge, "limit"),
        (film("image/apng", frames())[:-400], MalformedBody, "truncated"),
        (film("image/webp", frames())[:-100], MalformedBody, "truncated"),
        (saved(np.asfortranarray(frames())), InvalidImage, "C order"),
    ],
    ids=range(8),
)
def test_what_is_no_clip_is_refused(body, error, words):
    def read():
        found = reel(body)
        return found.read(found.count, WHITE)

    with pytest.raises(error, match=words):
        read()


def test_a_zip_of_bombs_is_not_inflated(monkeypatch):
    """Files that claim a hundred megabytes each, for frames of 48 pixels: of none more than a header is read."""
    picture, junk = write_png(frames()[0]), b"\xff" * (100 << 20)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", picture)
        archive.writestr("1.png", picture + junk)
    read: list[int] = []
    inflate = npz._inflate

    def noted(*how):
        found = inflate(*how)
        read.append(len(found))
        return found

    monkeypatch.setattr(npz, "_inflate", noted)
    found = reel(file.getvalue(), max_pixels=1 << 24)
    assert found.work < 1 << 20
    with pytest.raises(TooLarge, match="more than the limit"):
        found.read(2, WHITE)
    with zipfile.ZipFile(file := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", picture + junk)
    with pytest.raises(TooLarge, match="more than the limit"):
        reel(file.getvalue(), max_pixels=1 << 24).read(1, WHITE)
    assert max(read) < 1 << 20


def test_frames_of_a_zip_are_not_larger_than_they_may_be():
    with pytest.raises(TooLarge, match="8x6 pixels"):
        reel(zipped({"0.png": write_png(frames()[0])}), max_pixels=47)


@pytest.mark.parametrize("said", [6, 1 << 30])
def test_an_animation_that_says_more_frames_than_it_has_ends_in_an_error(said):
    body = bytearray(film("image/apng", frames()))
    at = body.index(b"acTL")
    body[at + 4 : at + 8] = said.to_bytes(4)
    body[at + 12 : at + 16] = zlib.crc32(body[at : at + 12]).to_bytes(4)
    found = reel(bytes(body))
    assert found.count == said
    assert len(found.read(5, WHITE)) == 5
    with pytest.raises(MalformedBody):
        found.read(1, WHITE)


def test_a_video_is_told_by_its_first_bytes():
    assert is_video(b"\0\0\0\x20ftypisom")
    assert is_video(b"\x1a\x45\xdf\xa3")
    assert not is_video(write_png(frames()[0]))
