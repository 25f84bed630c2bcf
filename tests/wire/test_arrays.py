import io
from dataclasses import astuple

import numpy as np
import pytest

from app.errors import InvalidLatent, MalformedBody, UnsupportedMedia
from app.wire.arrays.latents import latent_shape, read_latents
from app.wire.arrays.npy import MAX_HEADER, write_npy
from app.wire.arrays.tensors import write_safetensors


def noise(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def saved(array, **options):
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npy(text, data=b"", version=1):
    header = text.encode()
    width = 2 if version == 1 else 4
    return b"\x93NUMPY" + bytes([version, 0]) + len(header).to_bytes(width, "little") + header + data


def declared(descr="<f2", shape="(1, 4, 2, 2)", order="False"):
    return f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}\n"


def read(body):
    return read_latents(body, max_bytes=1 << 20)


def refuse(body, error, match):
    """Both doors refuse, with the same words."""
    with pytest.raises(error, match=match) as at_admission:
        latent_shape(body)
    with pytest.raises(error, match=match) as at_reading:
        read(body)
    assert str(at_admission.value) == str(at_reading.value)
    assert len(str(at_reading.value)) < 200


# ---------------------------------------------------------------------------------------------------------------- .npy


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f2", ">f4"])
@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 4, 3, 5), (3, 16, 1, 1)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(dtype, shape, order):
    array = np.asarray(noise(*shape, dtype=dtype), order=order)
    body = saved(array)
    latents = read(body)
    assert latents.items[0].dtype == array.dtype.newbyteorder("=")
    assert latents.items[0].dtype.isnative
    assert latents.items[0].flags.c_contiguous
    assert latents.items[0].flags.writeable
    assert not np.shares_memory(latents.items[0], np.frombuffer(body, np.uint8))
    batch = array.reshape(-1, *shape[-3:])
    np.testing.assert_array_equal(latents.items, batch)
    assert astuple(latent_shape(body)) == ((batch.shape,), latents.items[0].dtype.name, None, None, None, False, False)
    assert (latents.family, latents.convention, latents.origin) == (None, None, None)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_versions(version):
    file = io.BytesIO()
    np.lib.format.write_array(file, noise(4, 2, 2), version=version)
    np.testing.assert_array_equal(read(file.getvalue()).items, noise(4, 2, 2)[None])


def test_header_of_another_writer():
    text = '{"shape":(4,1,1),"fortran_order":False,"descr":"<f4"}'
    np.testing.assert_array_equal(read(npy(text, noise(4, 1, 1).tobytes())).items, noise(1, 4, 1, 1))


@pytest.mark.parametrize(
    ("dtype", "named"),
    [
        (np.float64, "float64"),
        (np.int64, "int64"),
        (np.uint8, "uint8"),
        (np.int32, "int32"),
        ("<c8", "<c8"),
        ("?", "b1"),
    ],
)
def test_other_dtypes(dtype, named):
    refuse(saved(np.ones((1, 4, 2, 2), dtype)), InvalidLatent, f"expected float16 or float32, got .*{named}")


def test_pickled_objects_are_not_opened():
    body = saved(np.array([{"a": print}] * 4, object).reshape(1, 4, 1, 1), allow_pickle=True)
    refuse(body, InvalidLatent, "expected float16 or float32, got objects")


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_clip_of_one_frame_is_a_picture(order):
    clip = noise(2, 4, 1, 3, 5)
    body = saved(np.asarray(clip, order=order))
    assert latent_shape(body).parts == ((2, 4, 3, 5),)
    assert np.array_equal(np.stack(read_latents(body, max_bytes=1 << 20).items), clip[:, :, 0])
    refuse(saved(noise(1, 4, 2, 3, 5)), InvalidLatent, r"\(N, C, 1, h, w\), got 2 in .* \(1, 4, 2, 3, 5\): clips are")


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (1, 1, 1, 4, 2, 2)])
def test_other_ranks(shape):
    refuse(saved(np.zeros(shape, np.float16)), InvalidLatent, r"expected a shape of \(C, h, w\) or \(N, C, h, w\)")


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (4, 0, 2), (1, 4, 2, 0)])
def test_no_rows(shape):
    refuse(saved(np.zeros(shape, np.float16)), InvalidLatent, "no dimension of 0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_finite(value):
    array = noise(2, 4, 3, 5, dtype=np.float16)
    array[1, 2, 0, 3] = array[1, 3, 1, 1] = value
    with pytest.raises(InvalidLatent, match=r"2 of 120 values are NaN or infinite.*\(1, 2, 0, 3\)"):
        read(saved(array))


@pytest.mark.parametrize("shape", ["(1, 4, 500000, 500000)", "(1, 4, 2, 3)", "(1, 4, 1, 1)", "(1000000, 1000000, 1)"])
def test_lying_shape(shape):
    refuse(npy(declared(shape=shape), bytes(32)), MalformedBody, "declares [0-9]+ bytes of data, 32 are there")


def test_endless_numbers():
    refuse(npy(declared(shape=f"({'9' * 900}, {'9' * 900}, 1)"), bytes(8)), InvalidLatent, "expected a shape")


@pytest.mark.parametrize("cut", [7, 9, 40, 127, 129, 159])
def test_truncated(cut):
    refuse(saved(np.ones((1, 4, 2, 2), np.float16))[:cut], MalformedBody, "truncated|declares")


@pytest.mark.parametrize(
    "body",
    [
        npy("this is a text file"),
        npy("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1, 4, 2, 2), }"),
        npy("{'descr': '<f2', 'fortran_order': False, 'shape': __import__('os').getpid(), }"),
        npy(declared(order="0"), bytes(32)),
        npy(declared() + " " * MAX_HEADER, bytes(32)),
        npy(declared(), bytes(32), version=9),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    ],
)
def test_no_header(body):
    refuse(body, MalformedBody, "the .npy header")


@pytest.mark.parametrize(
    ("body", "named"),
    [(b"", "an empty body"), (b"hello", "hello"), (b"\x89PNG\r\n\x1a\n", "PNG"), (b'{"a": 1, "b"', "a")],
)
def test_not_an_array(body, named):
    refuse(body, UnsupportedMedia, f"expected npy, npz, safetensors or pt, got .*{named}")


# ------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint8, np.uint16])
def test_write_npy_equals_numpy(dtype):
    array = noise(2, 4, 3, 5).astype(dtype)
    assert write_npy(array) == saved(array)


def test_write_npy_of_a_view():
    batch = noise(8, 4, 64, 64)
    body = write_npy(batch[3:4, :, ::2])
    assert len(body) < batch.nbytes // 8
    np.testing.assert_array_equal(np.load(io.BytesIO(body)), batch[3:4, :, ::2])


@pytest.mark.parametrize("write", [write_npy, lambda array: write_safetensors(array, {})])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_round_trip(write, dtype):
    array = noise(2, 4, 3, 5, dtype=dtype)
    np.testing.assert_array_equal(read(write(array)).items, array)
