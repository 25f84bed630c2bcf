"""Our writer against the library's reader, and what is left when a write fails."""

import errno
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from app.errors import InvalidParameter
from app.weights.files import open_weights
from app.weights.safetensors import DTYPES
from app.weights.writing import TensorSpec, file_order, publish, safetensors_writer

DTYPED = [dtype for dtype in DTYPES.values() if dtype.is_floating_point or dtype in (torch.int64, torch.bool)]


def write(path, tensors, metadata=None, **options):
    ordered = file_order(TensorSpec(key, value.dtype, tuple(value.shape)) for key, value in tensors.items())
    writer = safetensors_writer(ordered, (tensors[spec.key] for spec in ordered), metadata)
    publish({path: writer}, **options)
    return path


@pytest.mark.parametrize("dtype", DTYPED)
def test_the_library_reads_what_we_write(tmp_path, dtype):
    tensors = {
        "b.one": torch.arange(6).reshape(2, 3).to(dtype),
        "a.scalar": torch.ones((), dtype=dtype),
        "c.empty": torch.zeros(0, 4, dtype=dtype),
        "d.turned": torch.arange(6).reshape(2, 3).to(dtype).T,
        "e.counter": torch.tensor(3),
    }
    path = write(tmp_path / "x.safetensors", tensors, {"b": "ü", "a": "1"})
    read = load_file(path)
    assert set(read) == set(tensors)
    for key, value in tensors.items():
        assert read[key].dtype == value.dtype
        assert torch.equal(read[key].double(), value.double())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "ü"}
    assert dict(open_weights(path).read(tensors)).keys() == tensors.keys()


def test_the_layout_of_the_file_is_the_library_s(tmp_path):
    tensors = {"b": torch.zeros(3), "a": torch.zeros(3, dtype=torch.float16), "z": torch.tensor(1)}
    assert write(tmp_path / "x.safetensors", tensors, {"format": "pt"}).read_bytes() == save(tensors, {"format": "pt"})


def test_metadata_is_in_order_and_readable_whatever_it_is(tmp_path):
    metadata = {"z\ud800": "1", "a": "\udcff", "m": "\x00\n"}
    path = write(tmp_path / "x.safetensors", {"x": torch.zeros(1)}, metadata)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert list(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]) == ["a", "m", "z\\ud800"]
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"z\\ud800": "1", "a": "\\udcff", "m": "\x00\n"}
    assert open_weights(path).metadata["m"] == "\x00\n"


def test_a_tensor_that_was_not_announced_is_a_bug_and_leaves_nothing(tmp_path):
    for tensors in ([torch.zeros(3)], [torch.zeros(2).half()], [], [torch.zeros(2)] * 2):
        writer = safetensors_writer([TensorSpec("x", torch.float32, (2,))], tensors)
        with pytest.raises(ValueError, match=r"announced|argument"):
            publish({tmp_path / "x.safetensors": writer})
    assert not list(tmp_path.iterdir())


def test_all_files_or_none(tmp_path):
    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "a").write_text("old")
    with pytest.raises(OSError, match=r"No space left on device: '.*b'"):
        publish({tmp_path / "a": lambda file: file.write(b"new"), tmp_path / "b": fail}, force=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


def test_the_check_comes_before_anything_appears(tmp_path):
    def check():
        assert [path.name.startswith(".a.") for path in tmp_path.iterdir()] == [True]
        raise InvalidParameter("no")

    with pytest.raises(InvalidParameter, match="no"):
        publish({tmp_path / "a": lambda file: file.write(b"x")}, check=check)
    assert not list(tmp_path.iterdir())


def test_a_file_that_comes_in_between_is_not_replaced(tmp_path):
    with pytest.raises(InvalidParameter, match="exists"):
        publish({tmp_path / "a": lambda file: file.write(b"x")}, check=(tmp_path / "a").touch)
    assert (tmp_path / "a").read_bytes() == b""


def test_a_folder_and_a_dangling_link_are_in_the_way(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("nowhere")
    with pytest.raises(InvalidParameter, match="is a folder"):
        publish({tmp_path / "a": lambda file: file.write(b"x")}, force=True)
    with pytest.raises(InvalidParameter, match="exists"):
        publish({tmp_path / "b": lambda file: file.write(b"x")})
