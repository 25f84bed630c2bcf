import io
import re
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from app.errors import InvalidLatent, MalformedBody, TooLarge
from app.wire.arrays.latents import LatentShape, latent_shape, read_latents
from app.wire.arrays.npy import write_npy
from app.wire.arrays.npz import MAX_MEMBERS, write_npz, write_zip

LIMIT = 1 << 20


def noise(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def saved(*arrays, save=np.savez, **named):
    file = io.BytesIO()
    save(file, *arrays, **named)
    return file.getvalue()


def zipped(files, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def lie(body, size):
    """States another uncompressed size for the only member, in its header and in the directory."""
    body = bytearray(body)
    struct.pack_into("<I", body, 22, size)
    struct.pack_into("<I", body, body.index(b"PK\x01\x02") + 24, size)
    return bytes(body)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_array(save):
    array = noise(2, 4, 3, 5)
    body = saved(array, save=save)
    np.testing.assert_array_equal(read_latents(body, max_bytes=LIMIT).items, array)
    assert latent_shape(body) == LatentShape(((2, 4, 3, 5),), "float32")


def test_several_arrays_join_in_the_order_they_were_given():
    arrays = [np.full((4, 2, 2), index, np.float16) for index in range(12)]
    body = saved(*arrays)  # arr_0 .. arr_11: by letters, arr_10 would come before arr_2
    latents = np.stack(read_latents(body, max_bytes=LIMIT).items)
    assert latents.shape == (12, 4, 2, 2)
    assert latents[:, 0, 0, 0].tolist() == list(range(12))
    assert latent_shape(body) == LatentShape(((1, 4, 2, 2),) * 12, "float16")


def test_batches_join():
    body = saved(a=noise(2, 4, 3, 5), b=noise(2, 4, 3, 5).astype(np.float16))
    latents = np.stack(read_latents(body, max_bytes=LIMIT).items)
    assert latents.shape == (4, 4, 3, 5)
    assert latents.dtype == np.float32
    assert latent_shape(body) == LatentShape(((2, 4, 3, 5),) * 2, "float32")


def test_different_shapes_are_a_list():
    arrays = [noise(1, 4, 2, 2), noise(2, 4, 2, 3).astype(np.float16), noise(16, 1, 1)]
    shape, items = latent_shape(saved(*arrays)), read_latents(saved(*arrays), max_bytes=LIMIT).items
    assert (shape.batch, shape.dtype) == (4, "float32")
    assert shape.shapes == [item.shape for item in items] == [(4, 2, 2), (4, 2, 3), (4, 2, 3), (16, 1, 1)]
    assert {item.dtype for item in items} == {np.dtype(np.float32)}
    for item, expected in zip(items, [arrays[0][0], *arrays[1], arrays[2]], strict=True):
        np.testing.assert_array_equal(item, expected)


@pytest.mark.parametrize(
    ("files", "match"),
    [({}, "empty"), ({"readme.txt": b"hello"}, "readme.txt"), ({"a.npy": write_npy(np.ones((1, 4, 2, 2)))}, "float64")],
)
def test_archives_without_latents(files, match):
    with pytest.raises(InvalidLatent, match=match):
        read_latents(zipped(files), max_bytes=LIMIT)


def test_not_finite():
    array = noise(1, 4, 2, 2)
    array[0, 0, 0, 1] = np.nan
    with pytest.raises(InvalidLatent, match="1 of 32 values"):
        read_latents(saved(noise(1, 4, 2, 2), array), max_bytes=LIMIT)


# ------------------------------------------------------------------------------------------------------------- hostile


def test_bomb_that_is_honest():
    body = zipped({"a.npy": write_npy(np.zeros((1, 4, 2048, 2048), np.float32))})
    assert len(body) < 100_000
    with pytest.raises(TooLarge, match="67108992 bytes uncompressed"):
        read_latents(body, max_bytes=LIMIT)


def test_bombs_are_added_up():
    body = saved(*[np.zeros((1, 4, 128, 128), np.float16)] * 9, save=np.savez_compressed)
    with pytest.raises(TooLarge, match="uncompressed"):
        read_latents(body, max_bytes=LIMIT)


def test_bomb_that_lies_is_not_inflated():
    honest = write_npy(np.zeros((1, 4, 4, 4), np.float16))
    body = lie(zipped({"a.npy": honest + bytes(1 << 26)}), len(honest))
    tracemalloc.start()
    try:
        with pytest.raises(MalformedBody, match="CRC"):
            read_latents(body, max_bytes=LIMIT)
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


def test_size_that_promises_more():
    array = np.zeros((1, 4, 4, 4), np.float16)
    with pytest.raises(MalformedBody):
        read_latents(lie(zipped({"a.npy": write_npy(array)}), 100_000), max_bytes=LIMIT)


def test_header_that_lies_inside():
    body = zipped({"a.npy": write_npy(np.zeros((1, 4, 4, 4), np.float16))[:-2]})
    with pytest.raises(MalformedBody, match="declares 128 bytes of data, 126 are there"):
        latent_shape(body)


def test_too_many_files():
    with pytest.raises(TooLarge, match="more than"):
        latent_shape(zipped({f"{index}.npy": b"" for index in range(MAX_MEMBERS + 1)}))


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_unbounded_compressions(compression):
    with pytest.raises(MalformedBody, match="neither stored nor deflated"):
        latent_shape(zipped({"a.npy": write_npy(noise(1, 4, 2, 2))}, compression))


def test_encrypted():
    body = bytearray(zipped({"a.npy": write_npy(noise(1, 4, 2, 2))}))
    body[body.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(MalformedBody, match="encrypted"):
        latent_shape(bytes(body))


@pytest.mark.parametrize("kept", [4, 30, 0.5, 0.9])
def test_truncated(kept):
    body = saved(noise(1, 4, 8, 8))
    with pytest.raises(MalformedBody, match="truncated or corrupt"):
        latent_shape(body[: kept if kept > 1 else int(kept * len(body))])


@pytest.mark.parametrize("name", ["9" * 5000 + ".npy", "a/../../etc/passwd.npy", "9.npy"])
def test_names_are_only_sorted(name):
    body = zipped({name: write_npy(noise(1, 4, 2, 2)), "x.npy": write_npy(noise(1, 4, 2, 2))})
    if len(name) > 5000:
        with pytest.raises(MalformedBody):
            latent_shape(body)
    else:
        assert latent_shape(body).batch == 2


# ------------------------------------------------------------------------------------------------------------- writing


def test_write_npz_keeps_order_and_shapes():
    arrays = [noise(1, 4, 2, index + 1, dtype=np.float16) for index in range(11)]
    with np.load(io.BytesIO(write_npz(arrays))) as archive:
        assert archive.files == sorted(archive.files) == [f"{index:02}" for index in range(11)]
        for name, array in zip(archive.files, arrays, strict=True):
            np.testing.assert_array_equal(archive[name], array)


def test_write_npz_reads_back():
    arrays = [noise(1, 4, 2, 2), -noise(1, 4, 2, 2)]
    np.testing.assert_array_equal(read_latents(write_npz(arrays), max_bytes=LIMIT).items, np.concatenate(arrays))
    with np.load(io.BytesIO(write_npz(arrays[:1]))) as archive:
        assert archive.files == ["0"]


def test_write_zip():
    files = [("0.png", b"first"), ("1.png", b"second" * 100)]
    body = write_zip(files)
    assert body == write_zip(files)
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        assert [(entry.filename, archive.read(entry)) for entry in archive.infolist()] == files
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {entry.external_attr >> 16 for entry in archive.infolist()} == {0o644}


# --------------------------------------------------------------------------------------------------------- sd-scripts


def cached(*shapes, mirrored=False, mask=False, ending=True, save=np.savez):
    """The arrays that sd-scripts keeps of a picture, under its names: float32 (C, h, w), the sizes as int64."""
    arrays: dict[str, np.ndarray] = {}
    for seed, shape in enumerate(shapes):
        name = f"_{shape[1]}x{shape[2]}" if ending else ""
        values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        arrays |= {f"latents{name}": values, f"original_size{name}": np.array((640, 427))}
        arrays[f"crop_ltrb{name}"] = np.array((0, 3, 640, 424))
        if mirrored:
            arrays[f"latents_flipped{name}"] = -values
        if mask:
            arrays[f"alpha_mask{name}"] = np.ones(shape[1:], np.float32)
    return saved(save=save, **arrays), [value for name, value in arrays.items() if re.match(r"latents($|_\d)", name)]


@pytest.mark.parametrize("more", [{}, {"mirrored": True}, {"mask": True}, {"mirrored": True, "mask": True}])
@pytest.mark.parametrize("ending", [True, False])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_of_a_cache_the_latents_are_read(more, ending, save):
    body, (values,) = cached((4, 6, 5), ending=ending, save=save, **more)
    np.testing.assert_array_equal(read_latents(body, max_bytes=LIMIT).items, values[None])
    assert latent_shape(body) == LatentShape(((1, 4, 6, 5),), "float32", cached=True)


def test_several_resolutions_are_several_latents():
    body, values = cached((16, 96, 64), (16, 64, 96), (16, 8, 8), mirrored=True, mask=True)
    items = read_latents(body, max_bytes=1 << 22).items
    assert [item.shape for item in items] == latent_shape(body).shapes == [(16, 8, 8), (16, 64, 96), (16, 96, 64)]
    for item in items:
        assert any(np.array_equal(item, value) for value in values)


def test_what_else_is_in_a_cache_counts_in_no_limit():
    body, _ = cached((4, 64, 64), mirrored=True)
    with pytest.raises(TooLarge, match="holds 65664 bytes"):
        read_latents(body, max_bytes=65_663)
    assert len(read_latents(body, max_bytes=65_664).items) == 1


def test_arrays_of_such_names_that_are_no_cache():
    body = saved(latents=noise(4, 2, 2), latents_flipped=noise(4, 2, 2))
    assert latent_shape(body) == LatentShape(((1, 4, 2, 2),) * 2, "float32")
    body = saved(latents_2x2=noise(4, 2, 2), original_size=noise(2))
    with pytest.raises(InvalidLatent, match="expected a shape"):
        latent_shape(body)


def test_a_cache_of_no_latents():
    body = saved(latents_2x2=np.ones((4, 2, 2)), original_size_2x2=np.array((16, 16)))
    with pytest.raises(InvalidLatent, match="got float64"):
        latent_shape(body)
