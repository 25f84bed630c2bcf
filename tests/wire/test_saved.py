"""Latents that torch itself saved, and files that try something."""

import struct
import tracemalloc
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from app.errors import InvalidInput, InvalidLatent, MalformedBody, TooLarge
from app.wire.arrays.latents import LatentShape, latent_shape, read_latents
from app.wire.arrays.npy import write_npy
from app.wire.arrays.npz import write_zip
from app.wire.arrays.saved import MAX_STEPS, MAX_TENSORS
from tests.store.hostile import CORPUS, PROOF, alone, legacy, saved, state, tensor, zipped

OLDER = pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
LIMIT = 1 << 20


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def read(body: bytes) -> np.ndarray:
    return np.stack(read_latents(body, max_bytes=LIMIT).items)


def refuse(body: bytes, error: type[Exception], match: str) -> None:
    for door in (latent_shape, read):
        with pytest.raises(error, match=match) as caught:
            door(body)
        assert len(str(caught.value)) < 400


@OLDER
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 4, 3, 5)])
def test_a_tensor(older, dtype, shape):
    values = noise(*shape).to(dtype)
    body = saved(values, older)
    expected = values.float().numpy().reshape(-1, *shape[-3:])
    np.testing.assert_array_equal(read(body).astype(np.float32), expected)
    item = read_latents(memoryview(body), max_bytes=LIMIT).items[0]
    assert item.flags.c_contiguous
    assert item.flags.writeable
    width = "float16" if dtype is torch.float16 else "float32"
    assert latent_shape(body) == LatentShape((expected.shape,), width)
    assert item.dtype == width


@OLDER
@pytest.mark.parametrize(
    "wrap",
    [
        lambda values: {"latents": values, "x": noise(9), "step": 3},
        lambda values: {"latent": values, "y": noise(9)},
        lambda values: {"samples": values, "noise_mask": noise(9)},  # what goes between the nodes of ComfyUI
        lambda values: OrderedDict(x=values, y=noise(9)),
        lambda values: {"anything": values, "prompt": "a cat"},
        lambda values: [values],
        lambda values: (values,),
        lambda values: {"latents": [values]},
        torch.nn.Parameter,
    ],
)
def test_what_it_may_be_wrapped_in(older, wrap):
    values = noise(1, 4, 2, 3)
    np.testing.assert_array_equal(read(saved(wrap(values), older)), values.numpy())


@OLDER
def test_a_list_follows_its_order_and_may_differ_in_shape(older):
    values = [noise(2, 4, 2, 2), noise(4, 3, 2).half()]
    body = saved(values, older)
    shape, items = latent_shape(body), read_latents(body, max_bytes=LIMIT).items
    assert shape == LatentShape(((2, 4, 2, 2), (1, 4, 3, 2)), "float32")
    for item, expected in zip(items, [*values[0], values[1].float()], strict=True):
        np.testing.assert_array_equal(item, expected.numpy())


@OLDER
@pytest.mark.parametrize(
    "view",
    [
        lambda base: base[1],
        lambda base: base[1:, :, ::2, 1:],
        lambda base: base.transpose(2, 3),
        lambda base: base.to(memory_format=torch.channels_last),
        lambda base: base[:, :1].contiguous().expand(-1, 1, -1, -1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views_of_more(older, view, dtype):
    values = view(noise(3, 4, 6, 5).to(dtype))
    expected = values.float().numpy().reshape(-1, *values.shape[-3:])
    np.testing.assert_array_equal(read(saved(values, older)), expected)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (noise(4, 2, 2).double(), "got float64"),
        (torch.ones(1, 4, 2, 2, dtype=torch.int64), "got int64"),
        (noise(4, 2, 2).to(torch.float8_e4m3fn), "got float8_e4m3fn"),
        (noise(4, 2), r"expected a shape of \(C, h, w\)"),
        (torch.tensor(1.0), r"expected a shape of \(C, h, w\)"),
        (noise(1, 4, 0, 2), "no dimension of 0"),
        ({"a": noise(4, 2, 2), "b": noise(4, 2, 2)}, "one tensor or one named latents or latent"),
        ({}, "expected a tensor"),
        ([], "expected a tensor"),
        ([noise(4, 2, 2), "text"], "expected a tensor"),
        ("text", "got str"),
        (noise(4, 2, 2).to_sparse(), "got a sparse tensor"),
    ],
)
def test_what_is_no_latents(content: Any, match: str):
    refuse(saved(content), InvalidLatent, match)


def test_not_finite():
    values = noise(1, 4, 2, 2)
    values[0, 1, 0, 1] = torch.nan
    with pytest.raises(InvalidLatent, match=r"1 of 16 values .*\(0, 1, 0, 1\)"):
        read(saved(values))


# ------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize("hostile", CORPUS, ids=lambda hostile: hostile.name)
def test_what_a_checkpoint_must_not_do_a_body_must_not_either(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput) as caught:
        latent_shape(hostile.build())
    assert len(str(caught.value)) < 400
    assert not (tmp_path / PROOF).exists()


def test_code_is_refused_by_its_name():
    hostile = next(one for one in CORPUS if one.name == "os.system")
    refuse(hostile.build(), MalformedBody, r"asks to call os\.system, and a file that calls functions could run code")


@pytest.mark.parametrize("container", [zipped, legacy])
def test_latents_that_claim_more_than_their_storage(container):
    body = container(state(latents=tensor(shape=(4, 1 << 20, 1 << 10), stride=(0, 0, 0))))
    refuse(body, InvalidLatent, "expected a tensor")


def test_one_storage_many_times_is_counted_before_it_is_copied():
    shared = noise(4, 64, 64)
    body = saved([shared] * 100)
    assert len(body) < 80_000
    assert latent_shape(body).batch == 100
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match="the tensors of the file are 6553600 bytes, more than the limit of 1048576"):
            read(body)
        assert tracemalloc.get_traced_memory()[1] < LIMIT
    finally:
        tracemalloc.stop()


def test_a_body_has_fewer_steps_than_a_checkpoint():
    values = noise(4, 1, 1)
    assert latent_shape(saved([values.clone() for _ in range(MAX_TENSORS)])).batch == MAX_TENSORS
    refuse(zipped(alone(b")" + b"\x85" * MAX_STEPS)), MalformedBody, "more than 50000 steps")


def test_too_many_tensors():
    refuse(saved([noise(4, 1, 1)] * (MAX_TENSORS + 1)), TooLarge, "1025 tensors, more than 1024")


def test_a_view_of_little_in_much():
    base = noise(4, 512, 512)
    refuse(saved(base[:, ::511, ::511]), MalformedBody, "spread over")


@OLDER
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.99])
def test_truncated(older, kept):
    body = saved(noise(4, 16, 16), older)
    refuse(body[: int(kept * len(body))], MalformedBody, "truncated|without its end")


def test_a_zip_file_of_arrays_is_not_taken_for_it():
    body = write_zip([("data.pkl.npy", write_npy(noise(4, 2, 2).numpy()))])
    assert latent_shape(body).parts == ((1, 4, 2, 2),)


def test_a_pickle_that_torch_did_not_write_is_not_read():
    with pytest.raises(InvalidInput, match="expected npy, npz, safetensors or pt, got bytes that begin with"):
        latent_shape(struct.pack("<2s", b"\x80\x04") + b"]\x94.")
