"""What is in a file, without its tensors; and what hostile or broken files are told."""

import json
import os
import pickle
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import UnsupportedCheckpoint
from app.weights.files import open_weights
from tests.store.weights import SUFFIXES, write

STATE = {
    "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "brain": torch.ones(4, dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "full": torch.arange(24.0).reshape(2, 3, 2, 2),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_header_and_tensors(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", STATE)
    header = open_weights(path)
    assert {key: (info.dtype, info.shape) for key, info in header.tensors.items()} == {
        key: (value.dtype, tuple(value.shape)) for key, value in STATE.items()
    }
    read = dict(open_weights(path).read(["full", "half", "count"]))
    assert list(read) == ["full", "half", "count"]
    for key, value in read.items():
        assert torch.equal(value, STATE[key])


def test_metadata(tmp_path):
    path = write(tmp_path / "x.safetensors", STATE, {"family": "sd1", "norm_num_groups": "8"})
    assert open_weights(path).metadata == {"family": "sd1", "norm_num_groups": "8"}


@pytest.mark.parametrize("content", [{"state_dict": STATE, "epoch": 1}, {"model": STATE}, {"a": {"b": STATE}}, STATE])
def test_levels_are_unwrapped(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    assert open_weights(tmp_path / "x.ckpt").tensors.keys() == STATE.keys()


def test_safetensors_with_a_pickle_s_suffix(tmp_path):
    write(tmp_path / "x.safetensors", STATE).rename(tmp_path / "x.ckpt")
    assert open_weights(tmp_path / "x.ckpt").tensors.keys() == STATE.keys()


def test_what_was_read_outlives_the_file(tmp_path):
    path = write(tmp_path / "x.safetensors", STATE)
    read = dict(open_weights(path).read(STATE))
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(read["full"], STATE["full"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_a_key_that_is_gone(tmp_path, suffix):
    path = write(tmp_path / f"x{suffix}", STATE)
    with pytest.raises(UnsupportedCheckpoint, match="nothing is not in the file"):
        list(open_weights(path).read(["nothing"]))


def refusal(path: Path) -> str:
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_weights(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", [b"", b"hello, this is a text file\n" * 9, b"\0" * 100, b"\x80", b"PK\x03\x04"])
def test_what_is_no_checkpoint(tmp_path, suffix, content):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert "not a" in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kept", [0.999, 0.5, 0.05])
def test_truncated(tmp_path, suffix, kept):
    path = write(tmp_path / f"x{suffix}", STATE)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "truncated" in refusal(path)


def test_truncated_says_how_much_is_missing(tmp_path):
    path = write(tmp_path / "x.safetensors", STATE)
    size = path.stat().st_size
    os.truncate(path, size - 7)
    assert refusal(path) == f"truncated: header promises {size} bytes, file has {size - 7}"


def test_missing_and_unreadable_files(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "x.safetensors")
    (tmp_path / "x.pt").mkdir()
    assert "cannot be read" in refusal(tmp_path / "x.pt")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("older", [False, True])
def test_a_pickle_that_runs_code_does_not_run_it(tmp_path, older):
    path, proof = tmp_path / "x.ckpt", tmp_path / "proof"
    torch.save({"state_dict": STATE, "x": Bomb(proof)}, path, _use_new_zipfile_serialization=not older)
    reason = refusal(path)
    assert "could run code" in reason
    assert "system" in reason
    with pytest.raises(UnsupportedCheckpoint, match="could run code"):
        list(open_weights(path).read(STATE))
    assert not proof.exists()


def test_a_plain_pickle_does_not_run_either(tmp_path):
    proof = tmp_path / "proof"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Bomb(proof), protocol=2))
    assert "system" in refusal(tmp_path / "x.pt")
    assert not proof.exists()


def test_a_pickle_without_tensors(tmp_path):
    contents: list[Any] = [{}, {"epoch": 1, "lr": 0.1}, [1, 2], {"state_dict": {}}]
    for content in contents:
        torch.save(content, tmp_path / "x.pt")
        assert "no tensors" in refusal(tmp_path / "x.pt")


def test_tensors_that_are_larger_than_the_file(tmp_path):
    torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 20)}, tmp_path / "x.pt")
    assert "claims more than the 4 bytes of its storage" in refusal(tmp_path / "x.pt")


def test_sparse_tensors(tmp_path):
    torch.save({"x": torch.eye(3).to_sparse()}, tmp_path / "x.pt")
    assert "sparse" in refusal(tmp_path / "x.pt")


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ([1], "no JSON object"),
        (b"{nonsense", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b'{"a":' * 100_000, "no JSON"),
        ({"x": 1}, "no dtype"),
        ({"x": {"dtype": "F32"}}, "no dtype"),
        ({"x": entry(dtype="F3")}, "F3"),
        ({"x": entry(shape=[3])}, "bytes 0 to 8"),
        ({"x": entry(shape=[-2])}, "shape"),
        ({"x": entry(shape=["2"])}, "shape"),
        ({"x": entry(shape=[1 << 62, 4])}, "shape"),
        ({"x": entry(offsets=[8, 16])}, "gap"),
        ({"x": entry(offsets=[-8, 0])}, "bytes -8 to 0"),
        ({"x": entry(), "y": entry()}, "overlap"),
        ({"x": entry(), "y": entry(offsets=[4, 12])}, "overlap"),
        ({"x": entry(shape=[4], offsets=[0, 16])}, "truncated"),
        ({"x": entry(shape=[1], offsets=[0, 4])}, "too long"),
        ({"__metadata__": [1], "x": entry()}, "metadata"),
        (b'{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "no UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_lies(tmp_path, header, reason):
    assert reason in refusal(with_header(tmp_path / "x.safetensors", header, b"\0" * 8))


def test_a_header_longer_than_the_limit(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    assert "not a safetensors file" in refusal(path)


def test_an_empty_tensor(tmp_path):
    path = with_header(tmp_path / "x.safetensors", {"x": entry(shape=[0, 3], offsets=[0, 0])})
    assert dict(open_weights(path).read(["x"]))["x"].shape == (0, 3)


def header_of(path: Path, text: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":[' + b"[]," * 2_000_000 + b"[]]}",
        b'{"a":' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}",
        b"{" + b",".join(b'"%x":0' % i for i in range(2_000_000)) + b"}",
    ],
    ids=["wide", "deep", "keys"],
)
def test_a_header_of_too_many_parts_is_not_parsed(tmp_path, text, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda _: pytest.fail("parsed"))
    with pytest.raises(UnsupportedCheckpoint, match="more than 1048576 parts"):
        open_weights(header_of(tmp_path / "x.safetensors", text))


@pytest.mark.parametrize("sides", [[int("9" * 4000)] * 600, [1] * 9, [0, 1 << 41]], ids=["endless", "many", "empty"])
def test_shapes_that_torch_could_not_have_are_refused_unmultiplied(tmp_path, sides):
    end = 2 if 0 not in sides else 0
    text = json.dumps({"a": {"dtype": "F16", "shape": sides, "data_offsets": [0, end]}}).encode()
    begun = time.monotonic()
    with pytest.raises(UnsupportedCheckpoint, match=r"a is F16 of shape .*, but has bytes 0 to") as caught:
        open_weights(header_of(tmp_path / "x.safetensors", text, bytes(end)))
    assert len(str(caught.value)) < 300
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("dtype", ["\ud800", "F\n" * 1000], ids=["surrogate", "lines"])
def test_words_of_the_header_stand_in_errors_as_plain_text(tmp_path, dtype):
    text = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 2]}}).encode()
    with pytest.raises(UnsupportedCheckpoint, match="which is not known here") as caught:
        open_weights(header_of(tmp_path / "x.safetensors", text, b"12"))
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_pipe_or_device_is_not_waited_for(tmp_path, suffix):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        assert refusal(tmp_path / f"{name}{suffix}") == "cannot be read: no regular file"


def test_a_file_that_was_replaced_since_its_header_was_read(tmp_path):
    path = write(tmp_path / "x.safetensors", STATE)
    file = open_weights(path)
    write(tmp_path / "y.safetensors", STATE).replace(path)
    with pytest.raises(UnsupportedCheckpoint, match=r"x\.safetensors was written to or replaced"):
        list(file.read(["half"]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_bytes_pass_once_and_the_wanted_tensors_with_them(tmp_path, suffix):
    base = torch.arange(40.0)
    state = STATE | {"a": base[:30], "b": base[20:], "c": base.reshape(5, 8).T, "none": torch.zeros(0, 3)}
    path = tmp_path / f"x{suffix}"
    write(path, state)
    passed = bytearray()
    read = dict(open_weights(path).read_all(["half", "a", "b", "c", "none", "full"], passed.extend))
    assert passed == path.read_bytes()
    assert read.keys() == {"half", "a", "b", "c", "none", "full"}
    for key, value in read.items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html><body>401</body></html>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
        (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "a picture"),
        (b"RIFF\0\0\0\nWEBPVP8 ", "a picture"),
        (b"Rar!\x1a\x07" + bytes(9), "a compressed archive"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    ],
)
def test_what_is_of_another_program_is_named(tmp_path, suffix, content, said):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(f"this is {said}")
