"""Video files are what FFmpeg takes them for: frame by frame what went in, of the colours that they say."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from app.errors import InvalidImage, MalformedBody, NotAcceptable, TooLarge
from app.wire.clips.films import FilmSpec
from app.wire.clips.reels import reel_of
from app.wire.clips.video import CODEC_OF, VideoFilm, check_video

MP4, WEBM, MKV = "video/mp4", "video/webm", "video/x-matroska"
WHITE = (255, 255, 255)


def frames(count=9, height=48, width=64):
    """Soft colours that move: what codecs are made for."""
    y, x, t = np.mgrid[:height, :width, :count].astype(np.float32)
    waves = [np.sin(x / 9 + t / 3), np.sin(y / 7 - t / 4), np.sin((x + y) / 11)]
    return np.stack([127.5 + 120 * wave for wave in waves], axis=-1).astype(np.uint8).transpose(2, 0, 1, 3)


def written(media, clip, lossless=False, fps=16):
    film = VideoFilm(media, FilmSpec(len(clip), fps, lossless))
    return [film.add(clip[:1]), film.add(clip[1:5]), film.add(clip[5:]), film.end()]


def reel(body, max_pixels=1 << 16):
    return reel_of(body, max_pixels=max_pixels)


def psnr(found, clip):
    return 10 * np.log10(255**2 / np.mean((found.astype(float) - clip) ** 2))


@pytest.mark.parametrize(("media", "lossless"), CODEC_OF)
def test_there_and_back(media, lossless):
    clip = frames()
    found = reel(b"".join(written(media, clip, lossless)))
    assert (found.size, found.count, found.fps) == ((64, 48), 9, 16)
    read = np.stack(found.read(1, WHITE) + found.read(8, WHITE))
    if lossless or media == MKV:
        assert np.array_equal(read, clip)
    else:
        assert psnr(read, clip) > 36
    found.close()


@pytest.mark.parametrize(("media", "lossless"), CODEC_OF)
def test_what_it_says_of_its_colours(media, lossless):
    with av.open(io.BytesIO(b"".join(written(media, frames(), lossless)))) as file:
        context = file.streams.video[0].codec_context
        in_rgb = lossless or media == MKV
        assert (context.color_primaries, context.color_trc) == (1, 1)
        assert (context.colorspace, context.color_range) == ((0, 2) if in_rgb else (1, 1))


@pytest.mark.parametrize("media", [MP4, WEBM])
def test_a_colour_is_that_colour_through_the_matrix(media):
    """Red in BT.709's limited range is Y 63, Cb 102, Cr 240; in BT.601's it would be 81, 90, 240."""
    clip = np.zeros((5, 48, 64, 3), np.uint8)
    clip[..., 0] = 255
    body = b"".join(written(media, clip))
    with av.open(io.BytesIO(body), "r") as file:
        planes = next(file.decode(video=0)).to_ndarray().reshape(-1)
    size = 48 * 64
    y, cb, cr = planes[:size], planes[size : size * 5 // 4], planes[size * 5 // 4 :]
    assert [round(float(np.median(plane))) for plane in (y, cb, cr)] == pytest.approx([63, 102, 240], abs=2)
    assert psnr(np.stack(reel(body).read(5, WHITE)), clip) > 36


@pytest.mark.parametrize(("media", "lossless"), CODEC_OF)
def test_bytes_leave_as_frames_come(media, lossless):
    parts = written(media, frames(), lossless)
    assert parts[0], "a file begins with the first frame"
    assert len(parts[1]) > len(parts[0]) / 2, "a frame is there as the next one comes"


@pytest.mark.parametrize(("media", "lossless"), CODEC_OF)
def test_a_film_that_is_cut_has_fewer_frames(media, lossless):
    parts = written(media, frames(), lossless)
    assert reel(b"".join(parts[:2])).count < 9


def test_alpha_is_laid_over_white():
    clip = np.zeros((5, 48, 64, 4), np.uint8)
    assert (np.stack(reel(b"".join(written(MKV, clip))).read(5, WHITE)) == 255).all()


@pytest.mark.parametrize("media", [MP4, WEBM])
def test_sides_are_never_changed_behind_one_s_back(media):
    check_video(media, True, (63, 47))
    check_video(MKV, False, (63, 47))
    with pytest.raises(NotAcceptable, match="even sides, the frames have 63x48"):
        check_video(media, False, (63, 48))
    odd = frames(5, 47, 63)
    assert np.array_equal(np.stack(reel(b"".join(written(media, odd, lossless=True))).read(5, WHITE)), odd)


def test_a_file_that_says_nothing_of_its_colours_is_read_as_players_do():
    """BT.601 below HD."""
    red = np.zeros((48, 64, 3), np.uint8)
    red[..., 0] = 255
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = av.VideoFrame.from_ndarray(red, format="rgb24").reformat(format="yuv420p", dst_colorspace=5)
        picture.colorspace = 2
        container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    (found,) = reel(file.getvalue()).read(1, WHITE)
    assert np.abs(found.astype(int) - red).max() <= 4


def test_more_pixels_than_may_be_are_refused_before_they_are_decoded():
    with pytest.raises((TooLarge, MalformedBody)):
        reel(b"".join(written(MP4, frames())), max_pixels=64 * 47)


def test_a_film_that_grows_is_not_decoded():
    """The first frame is of 16x16, the second of 640x480, of which the decoder makes none."""
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        film = container.add_stream("libvpx-vp9", rate=10)
        film.width, film.height = 16, 16
        for number, (width, height) in enumerate([(16, 16), (640, 480)]):
            encoder = av.VideoCodecContext.create("libvpx-vp9", "w")
            encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuv420p"
            encoder.time_base = Fraction(1, 10)
            picture = av.VideoFrame.from_ndarray(frames(1, height, width)[0], format="rgb24")
            for packet in [*encoder.encode(picture), *encoder.encode(None)]:
                packet.stream, packet.pts, packet.dts = film, number, number
                packet.time_base = Fraction(1, 10)
                container.mux(packet)
    found = reel(file.getvalue(), 1 << 20)
    assert (found.size, found.count) == ((16, 16), 2)
    assert len(found.read(1, WHITE)) == 1
    with pytest.raises(MalformedBody, match="not read"):
        found.read(1, WHITE)


@pytest.mark.parametrize("media", [MP4, WEBM, MKV])
def test_what_is_broken_is_said_to_be(media):
    body = b"".join(written(media, frames()))
    rng = np.random.default_rng(0)
    for cut in (5, 40, 300, len(body) // 2):
        broken = bytearray(body[: len(body) - cut])
        for place in rng.integers(16, len(broken), 8):
            broken[place] ^= 0xFF
        try:
            found = reel(bytes(broken))
            read = found.read(found.count, WHITE)
        except (MalformedBody, InvalidImage, TooLarge):
            continue
        assert {frame.shape for frame in read} <= {(48, 64, 3)}


def test_a_file_without_a_film_is_none():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(InvalidImage, match="no film"):
        reel(file.getvalue())
