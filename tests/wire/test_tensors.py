import json

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from app.errors import InvalidLatent, MalformedBody
from app.wire.arrays.latents import LatentShape, latent_shape, read_latents
from app.wire.arrays.tensors import MAX_HEADER, write_safetensors
from app.wire.origin import Origin

METADATA = {"model": "a", "sha256": "0f" * 32, "family": "sd1", "convention": "scaled", "image_size": "640x427"}


def noise(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def file(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(begin=0, end=32, dtype="F16", shape=(1, 4, 2, 2)):
    return {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}


def read(body):
    return read_latents(body, max_bytes=1 << 20)


def refuse(body, error, match):
    for door in (latent_shape, read):
        with pytest.raises(error, match=match) as caught:
            door(body)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 4, 3, 5)])
def test_files_of_the_library(dtype, shape):
    array = noise(*shape, dtype=dtype)
    body = safetensors.numpy.save({"anything": array}, METADATA)
    latents = read(body)
    batch = array.reshape(-1, *shape[-3:])
    np.testing.assert_array_equal(latents.items, batch)
    assert latents.items[0].flags.writeable
    assert (latents.family, latents.convention, latents.origin) == ("sd1", "scaled", Origin(((640, 427),)))
    said = latent_shape(body)
    assert (said.parts, said.dtype, said.family, said.convention) == ((batch.shape,), array.dtype.name, "sd1", "scaled")
    assert said.origin == latents.origin


def test_our_files_in_the_library():
    array = noise(2, 4, 3, 5, dtype=np.float16)[:, ::2]
    body = write_safetensors(array, METADATA)
    np.testing.assert_array_equal(safetensors.numpy.load(body)["latents"], array)
    assert int.from_bytes(body[:8], "little") % 8 == 0
    latents = read(body)
    np.testing.assert_array_equal(latents.items, array)
    assert latents.origin == Origin(((640, 427),))


def test_without_metadata():
    latents = read(safetensors.numpy.save({"x": noise(1, 4, 2, 2)}))
    assert (latents.family, latents.convention, latents.origin) == (None, None, None)


def test_bfloat16_becomes_float32():
    exact = np.array([1.0, -2.5, 0.0, 3.140625], np.float32)
    data = (exact.view(np.uint32) >> 16).astype("<u2").tobytes()
    body = file({"x": tensor(0, 8, "BF16", (4, 1, 1))}, data)
    latents = np.stack(read(body).items)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents.ravel(), exact)
    assert latent_shape(body) == LatentShape(((1, 4, 1, 1),), "float32")


@pytest.mark.parametrize("name", ["latents", "latent_tensor", "latent"])
def test_the_named_one_of_several(name):
    array = noise(1, 4, 2, 2)
    body = safetensors.numpy.save({"a": noise(3), name: array, "z": np.zeros(5, np.int64)})
    np.testing.assert_array_equal(read(body).items, array)


@pytest.mark.parametrize(
    ("marker", "convention", "family"),
    [({"latent_format_version_0": torch.tensor([])}, "raw", None), ({}, "scaled", "sd1")],
)
def test_latents_of_comfyui(marker, convention, family):
    values = torch.from_numpy(noise(1, 4, 2, 2))
    body = safetensors.torch.save({"latent_tensor": values, **marker}, {"prompt": "{}"})
    latents, said = read(body), latent_shape(body)
    np.testing.assert_array_equal(latents.items, values.numpy())
    assert latents.convention == said.convention == convention
    assert latents.family == said.family == family


def test_what_a_file_says_goes_before_what_its_names_tell():
    body = safetensors.numpy.save({"latent_tensor": noise(1, 4, 2, 2)}, {"convention": "raw", "family": "sdxl"})
    assert (read(body).convention, read(body).family) == ("raw", "sdxl")


# ------------------------------------------------------------------------------------------------------------- hostile


def test_not_finite():
    array = noise(1, 4, 2, 2, dtype=np.float16)
    array[0, 3, 1, 1] = np.inf
    with pytest.raises(InvalidLatent, match=r"1 of 16 values .*\(0, 3, 1, 1\)"):
        read(write_safetensors(array, {}))


@pytest.mark.parametrize("tensors", [{}, {"a": tensor(0, 32), "b": tensor(32, 64)}])
def test_which_tensor(tensors):
    refuse(file(tensors, bytes(32 * len(tensors))), InvalidLatent, "expected one tensor, or one named latents")


@pytest.mark.parametrize(
    ("dtype", "named"), [("F64", "float64"), ("I64", "I64"), ("F8_E4M3", "F8_E4M3"), ("x" * 999, "xxx")]
)
def test_other_dtypes(dtype, named):
    refuse(file({"x": tensor(dtype=dtype)}, bytes(32)), InvalidLatent, f"expected float16 or float32, got {named}")


@pytest.mark.parametrize("shape", [(), (16,), (4, 4), (1, 1, 1, 4, 2, 2)])
def test_other_ranks(shape):
    refuse(file({"x": tensor(shape=shape)}, bytes(32)), InvalidLatent, "expected a shape")


def test_no_rows():
    refuse(file({"x": tensor(0, 0, shape=(1, 4, 0, 2))}), InvalidLatent, "no dimension of 0")


@pytest.mark.parametrize(
    "tensors",
    [
        {"latents": tensor(0, 32), "b": tensor(16, 48)},  # they overlap
        {"latents": tensor(0, 32), "b": tensor(0, 32)},
        {"latents": tensor(0, 32), "b": tensor(40, 72)},  # a gap
        {"latents": tensor(8, 40)},
        {"latents": tensor(-8, 24)},
        {"latents": tensor(32, 0)},
        {"latents": tensor(0, 24)},  # its shape needs 32
        {"latents": tensor(0, 32), "b": tensor(32, 2**63)},
        {"latents": tensor(0, 10**12, shape=(1, 4, 500000, 250000))},
        {"latents": tensor(shape=(1, 4, 2, 3))},
    ],
)
@pytest.mark.parametrize("size", [24, 32, 48, 72])
def test_lying_offsets(tensors, size):
    refuse(file(tensors, bytes(size)), MalformedBody, "offsets overlap or leave a gap|declares -?[0-9]+ bytes of data")


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "text",
        {},
        {"dtype": "F16", "shape": [1, 4, 2, 2]},
        tensor(shape="1422"),
        tensor(shape=(1, 4, 2.0, 2)),
        tensor(shape=(1, 4, -2, -2)),
        tensor(shape=(1, 4, True, 2)),
        tensor(dtype=16),
        tensor(begin="0"),
        tensor(end=None),
        {"dtype": "F16", "shape": [1, 4, 2, 2], "data_offsets": [0, 16, 32]},
    ],
)
def test_broken_entries(entry):
    refuse(file({"latents": entry}, bytes(32)), MalformedBody, "no dtype, shape and data_offsets for 'latents'")


@pytest.mark.parametrize(
    "body",
    [
        file({"x": tensor()}, length=10**6),
        file({"x": tensor()}, length=2**32 - 1),
        file({"x": tensor()})[:20],
        file(b"{" + b" " * MAX_HEADER),
        file(b"{not json"),
        file(b'{"a":' * 100_000),  # deeper than the parser goes
        file(b"{\xff\xfe}"),
        file({"__metadata__": [], "x": tensor()}, bytes(32)),
        file({"__metadata__": {"a": 1}, "x": tensor()}, bytes(32)),
        file(b'{"x": ' + b"9" * 5000 + b"}"),
    ],
)
def test_broken_headers(body):
    refuse(body, MalformedBody, "safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("convention", "half"),
        ("image_size", "640"),
        ("image_size", "0x0"),
        ("image_size", "8x8, "),
        ("image_fit", "error"),
        ("image_offset", "1x2"),
    ],
)
def test_metadata_that_cannot_be_meant(key, value):
    refuse(write_safetensors(noise(1, 4, 2, 2), {"image_size": "8x8"} | {key: value}), InvalidLatent, f"{key}.*{value}")
