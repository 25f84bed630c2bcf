"""What a call in a pickle yields: a description, an inert placeholder, or a refusal that names it."""

import pytest
import torch

from app.errors import UnsupportedCheckpoint
from app.weights.rebuilds import (
    DTYPES,
    INERT,
    INERT_PREFIXES,
    STORAGES,
    Global,
    Opaque,
    StorageRef,
    TensorRef,
    call,
    kind,
    storage_of,
    tensor,
)

FLOATS = StorageRef("0", "torch.float32", 24)


def called(name: str, *arguments: object) -> object:
    return call(Global(name), arguments, lambda steps: None)


def test_a_tensor():
    ref = called("torch._utils._rebuild_tensor_v2", FLOATS, 6, (2, 3), (3, 1), False, {})
    assert isinstance(ref, TensorRef)
    assert (ref.dtype, ref.shape, ref.stride, ref.offset) == ("torch.float32", (2, 3), (3, 1), 6)
    assert ref.nbytes == 24
    assert ref.span == (24, 48)


def test_a_tensor_of_a_dtype_without_storage_class():
    untyped = StorageRef("0", "torch.uint8", 4)
    ref = called("torch._utils._rebuild_tensor_v3", untyped, 0, (2,), (1,), False, {}, Global("torch.uint16"))
    assert isinstance(ref, TensorRef)
    assert ref.dtype == "torch.uint16"
    assert ref.span == (0, 4)
    other = called("torch._utils._rebuild_tensor_v3", untyped, 0, (2,), (1,), False, {}, Global("torch.float4"))
    assert kind(other) == "a tensor of dtype torch.float4"


@pytest.mark.parametrize("name", ["torch.nn.parameter.Parameter", "torch.Tensor"])
def test_parameters_are_tensors(name):
    inner: tuple[object, ...] = (FLOATS, 0, (2,), (1,), False, {})
    rebuild = Global("torch._utils._rebuild_tensor_v2")
    ref = called("torch._tensor._rebuild_from_type_v2", rebuild, Global(name), inner, {"note": 1})
    assert isinstance(ref, TensorRef)
    assert called("torch._utils._rebuild_parameter", ref, True, {}) is ref
    assert called("torch._utils._rebuild_parameter_with_state", ref, True, {}, {}) is ref


@pytest.mark.parametrize("name", sorted(INERT) + [f"{prefix}anything" for prefix in INERT_PREFIXES])
def test_inert_calls(name):
    assert isinstance(called(name, "anything"), Opaque)


@pytest.mark.parametrize("name", ["builtins.compile", "torch._utils_evil", "pytorch_lightning_evil.x", "numpyx.dtype"])
def test_other_calls_are_refused_by_name(name):
    with pytest.raises(UnsupportedCheckpoint, match=f"asks to call {name},"):
        called(name)


def test_no_table_names_what_could_do_harm():
    words = ("system", "eval", "exec", "import", "open", "popen", "getattr", "load", "hub", "subprocess", "compile")
    assert not [name for name in INERT if any(word in name.lower() for word in words)]


def test_a_rebuild_of_itself_is_no_recursion():
    name = "torch._tensor._rebuild_from_type_v2"
    with pytest.raises(UnsupportedCheckpoint, match="of itself"):
        called(name, Global(name), Global("torch.Tensor"), (), {})


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(20, (5,), (1,)), (0, (5, 6), (5, 1)), (0, (2, 2), (23, 1)), (0, (100,), (0,)), (0, (1 << 62,), (0,))],
)
def test_more_than_its_storage_holds(offset, shape, stride):
    assert "claims more than the 96 bytes" in kind(tensor(FLOATS, offset, shape, stride))


@pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [
        (0, [2], (1,)),
        (0, (2.0,), (1,)),
        (0, (True,), (1,)),
        (True, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, (1,) * 9, (1,) * 9),
        (0, (1 << 63,), (1,)),
    ],
)
def test_no_sizes(offset, shape, stride):
    with pytest.raises(UnsupportedCheckpoint, match="not a sound pickle"):
        tensor(FLOATS, offset, shape, stride)


def test_every_storage_of_the_table():
    for name, dtype in STORAGES.items():
        ref = storage_of(("storage", Global(f"torch.{name}"), "7", "cuda:0", 5))
        assert isinstance(ref, StorageRef)
        assert (ref.key, ref.dtype, ref.numel) == ("7", dtype, 5)
        assert dtype in DTYPES


def test_the_bytes_of_an_element_are_torchs():
    for name, itemsize in DTYPES.items():
        dtype = getattr(torch, name.removeprefix("torch."))
        assert (str(dtype), dtype.itemsize) == (name, itemsize)


def test_other_persistent_ids():
    assert storage_of(("module", Global("x.Net"), None, None)) == Global("x.Net")
    assert isinstance(storage_of(("storage", Global("torch.FloatStorage"), "7", "cpu", 5, ("8", 0, 2))), Opaque)
    assert isinstance(storage_of(("storage", Global("evil.FloatStorage"), "7", "cpu", 5)), Opaque)
    for identity in (("storage", Global("torch.FloatStorage"), 7, "cpu", 5), ("file", "x"), (), "x", None, (0,) * 99):
        with pytest.raises(UnsupportedCheckpoint, match="persistent id"):
            storage_of(identity)
    with pytest.raises(UnsupportedCheckpoint, match="persistent id"):
        storage_of(("storage", Global("torch.FloatStorage"), "7", "cpu", -1))


def test_pairs_make_a_dict_and_are_counted():
    spent: list[int] = []
    pairs = [["a", 1], ("b", 2), [3, 4], "no", ["x"]]
    assert call(Global("collections.OrderedDict"), (pairs,), spent.append) == {"a": 1, "b": 2}
    assert spent == [5]
