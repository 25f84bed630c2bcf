"""Both containers of torch.save: what is read of them, what is in them, and what becomes of broken ones."""

import io
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import UnsupportedCheckpoint
from app.weights.files import open_weights
from tests.store.hostile import legacy, records, saved, state, storage, tensor, text, zipped

OLDER = pytest.mark.parametrize("older", [False, True], ids=["zip", "older"])
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.uint16, torch.complex64),
)


def loaded(path: Path, *keys: str) -> dict[str, Tensor]:
    return dict(open_weights(path).read(keys or open_weights(path).tensors))


@OLDER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(tmp_path, older, dtype):
    value = torch.arange(6).reshape(2, 3).to(dtype)
    (tmp_path / "x.pt").write_bytes(saved({"x": value, "y": torch.ones(2)}, older))
    read = loaded(tmp_path / "x.pt")["x"]
    assert read.dtype is dtype
    assert read.view(torch.uint8).equal(value.view(torch.uint8))


@OLDER
def test_views_of_one_storage(tmp_path, older):
    base = torch.arange(24.0).reshape(4, 6)
    values = {
        "base": base,
        "row": base[2],
        "column": base[:, 1],
        "turned": base.t(),
        "last": base.permute(1, 0)[3:, 1:],
        "images": torch.arange(120.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "buffer": torch.nn.Buffer(torch.ones(3)),
    }
    path = tmp_path / "x.pt"
    path.write_bytes(saved(values, older))
    read = loaded(path)
    for key, value in values.items():
        assert torch.equal(read[key], value), key
        assert read[key].is_contiguous()
        assert type(read[key]) is Tensor
    read["base"].zero_()
    assert torch.equal(read["row"], base[2])


class Attributed(Tensor):
    """A subclass, which is pickled with its class."""


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and in files for longer
@OLDER
def test_what_is_no_dense_tensor_is_told_when_it_is_asked_for(tmp_path, older):
    quantised = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.note = "x"  # type: ignore[attr-defined]
    content: dict[str, Any] = {
        "x": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "quantised": quantised,
        "subclass": torch.ones(2).as_subclass(Attributed),
        "array": torch.ones(2).numpy(),
        "step": 3,
        "noted": attributed,
    }
    path = tmp_path / "x.pt"
    path.write_bytes(saved(content, older))
    header = open_weights(path)
    assert header.tensors.keys() == {"x", "noted"}
    assert header.others["sparse"] == "a sparse tensor"
    assert header.others["quantised"] == "a quantised tensor"
    assert "Attributed" in header.others["subclass"]
    assert "_reconstruct" in header.others["array"]
    assert header.others["step"] == "int"
    assert torch.equal(loaded(path, "x")["x"], torch.ones(2))
    for key, what in header.others.items():
        with pytest.raises(UnsupportedCheckpoint) as caught:
            loaded(path, key)
        assert str(caught.value) == f"{key} is {what}; a dense tensor was expected"


def test_older_forms_of_the_rebuild(tmp_path):
    arguments = storage() + b"K\x01K\x03\x85K\x01\x85"
    old = b"ctorch._utils\n_rebuild_tensor\n(" + arguments + b"tR"
    cuda = tensor(kind=b"ctorch.cuda\nFloatStorage\n")
    sized = tensor().replace(b"(\x8a\x01\x04t", b"ctorch\nSize\n(\x8a\x01\x04t\x85R")
    for container in (zipped, legacy):
        data = struct.pack("<4f", 0, 1, 2, 3)
        body = state(old=old, cuda=cuda, sized=sized)
        file = zipped(body, {"0": data}) if container is zipped else legacy(body, data=data)
        (tmp_path / "x.pt").write_bytes(file)
        read = loaded(tmp_path / "x.pt")
        assert read["old"].tolist() == [1, 2, 3]
        assert read["cuda"].tolist() == read["sized"].tolist() == [0, 1, 2, 3]


def test_a_tensor_spread_over_far_more_than_its_size(tmp_path):
    base = torch.zeros(1 << 20)
    torch.save({"x": base[:: (1 << 20) - 1], "y": base[::8]}, tmp_path / "x.pt")
    assert loaded(tmp_path / "x.pt", "y")["y"].shape == (1 << 17,)
    with pytest.raises(UnsupportedCheckpoint, match="x has 8 bytes, spread over 4194304"):
        loaded(tmp_path / "x.pt", "x")


def test_an_empty_tensor_of_absurd_shape(tmp_path):
    shape = (0, 1 << 39, 1 << 39)
    (tmp_path / "x.pt").write_bytes(zipped(state(x=tensor(), y=tensor(shape=shape, stride=(1, 1, 1)))))
    assert "y" in open_weights(tmp_path / "x.pt").others


def test_zip_storages_that_are_shorter_than_they_say(tmp_path):
    (tmp_path / "x.pt").write_bytes(zipped(state(x=tensor(numel=5)), {"0": bytes(16)}))
    with pytest.raises(UnsupportedCheckpoint, match="the storage of x has 16 bytes of 20"):
        open_weights(tmp_path / "x.pt")


def test_another_part_may_lack_its_storage(tmp_path):
    pickled = state(state_dict=state(x=tensor())[2:-1], optimizer=tensor("7", numel=1 << 40))
    (tmp_path / "x.pt").write_bytes(zipped(pickled))
    assert loaded(tmp_path / "x.pt")["x"].tolist() == [0, 0, 0, 0]


class Counted(io.FileIO):
    """A file that knows how many bytes were read of it."""

    taken = 0

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer) or 0
        Counted.taken += got
        return got


@OLDER
def test_only_what_is_needed_is_read(tmp_path, monkeypatch, older):
    large = torch.zeros(4 << 20)  # 16 MiB each
    content = {"state_dict": {"model.a": large, "first_stage_model.x": torch.ones(1000), "model.b": large + 1}}
    path = tmp_path / "x.ckpt"
    path.write_bytes(saved(content, older))
    monkeypatch.setattr(Path, "open", lambda self, mode: io.BufferedReader(Counted(str(self), mode)))
    Counted.taken = 0
    assert open_weights(path).tensors.keys() == content["state_dict"].keys()
    assert Counted.taken < 100_000
    Counted.taken = 0
    [(_, value)] = open_weights(path).read(["first_stage_model.x"])
    assert torch.equal(value, torch.ones(1000))
    assert Counted.taken < 200_000


def test_a_checkpoint_of_8_gb_is_described_without_its_data(tmp_path):
    """The storage is a hole in the file: the header of a full checkpoint costs what its pickle costs."""
    size = 8 << 30
    pickled = state(state_dict=state(big=tensor("0", size // 4, (size // 4,)), small=tensor("1"))[2:-1])
    path = tmp_path / "x.ckpt"
    entries = [("x/data.pkl", pickled, len(pickled)), ("x/data/1", b"\1" * 16, 16), ("x/data/0", b"", size)]
    directory = b""
    with path.open("wb") as file:
        for name, body, length in entries:
            at = file.tell()
            sizes = struct.pack("<2Q", length, length)
            local = struct.pack("<4s5H3I2H", b"PK\3\4", 45, 8, 0, 0, 0, 0, 0, 0, len(name), 0)
            central = (b"PK\1\2", 45, 45, 8, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), 28, 0, 0, 0, 0, 0xFFFFFFFF)
            extra = struct.pack("<2H", 1, 24) + sizes + struct.pack("<Q", at)
            directory += struct.pack("<4s6H3I5H2I", *central) + name.encode() + extra
            file.write(local + name.encode() + body)
            file.seek(length - len(body), 1)
        begin = file.tell()
        file.write(directory)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 3, 3, len(directory), begin))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, begin + len(directory), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("the file system has no holes")
    header = open_weights(path)
    assert header.tensors["big"].shape == (size // 4,)
    assert loaded(path, "small")["small"].view(torch.uint8).unique().tolist() == [1]


SAMPLE = {"state_dict": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.float16)}, "epoch": 3}


def outcome(path: Path) -> str | None:
    """The refusal, or None where the file was read; anything else that is raised fails the test."""
    values: dict[str, Tensor] = {}
    reason = None
    try:
        values = loaded(path)
    except UnsupportedCheckpoint as error:
        reason = str(error)
    assert sum(value.nbytes for value in values.values()) < 1 << 20
    assert reason is None or reason.isprintable()
    return reason


@OLDER
def test_every_truncation(tmp_path, older):
    data = saved(SAMPLE, older)
    path = tmp_path / "x.ckpt"
    for kept in range(0, len(data), 1 if older else 3):
        path.write_bytes(data[:kept])
        reason = outcome(path)
        assert reason is not None, kept
        assert "truncated" in reason, (kept, reason)


@OLDER
def test_mutants(tmp_path, older):
    """2,000 files with up to eight changed bytes: read, or refused with a line."""
    data, path = saved(SAMPLE, older), tmp_path / "x.ckpt"
    dice = random.Random(0)
    refused = 0
    for _ in range(2_000):
        mutant = bytearray(data)
        for _ in range(dice.randint(1, 8)):
            mutant[dice.randrange(len(mutant))] = dice.choice([0, 0xFF, dice.randrange(256)])
        path.write_bytes(mutant)
        refused += outcome(path) is not None
    assert 200 < refused < 2_000


def test_mutants_of_the_pickle_alone(tmp_path):
    """3,000 pickles with changed, dropped and moved bytes, in a sound container."""
    body = state(
        a=tensor(), b=b"ccollections\nOrderedDict\n)R" + b"(" + text("k") + b"]K\x01au", c=pickle.dumps([1.5], 4)[2:-1]
    )
    path, dice = tmp_path / "x.ckpt", random.Random(1)
    refused = 0
    for _ in range(3_000):
        mutant = bytearray(body)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(mutant))
            match dice.randrange(3):
                case 0:
                    mutant[at] = dice.randrange(256)
                case 1:
                    del mutant[at : at + dice.randint(1, 4)]
                case _:
                    mutant[at:at] = mutant[(begin := dice.randrange(len(mutant))) : begin + dice.randint(1, 9)]
        path.write_bytes(zipped(bytes(mutant)))
        refused += outcome(path) is not None
    assert 200 < refused < 3_000


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(100_000), "y": torch.ones(100_000)}, path)
    reading = open_weights(path).read(["x", "y"])
    next(reading)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(UnsupportedCheckpoint, match=r"truncated|lies about"):
        next(reading)


def test_a_byte_order_of_megabytes(tmp_path):
    (tmp_path / "x.pt").write_bytes(records({"x/data.pkl": state(x=tensor()), "x/byteorder": b"x" * 5_000_000}))
    with pytest.raises(UnsupportedCheckpoint, match="its byte order is xxxxxxxxxxxxxxxx;"):
        open_weights(tmp_path / "x.pt")


def test_keys_with_line_breaks_stay_on_one_line(tmp_path):
    key = "decoder\n\x1b[31m" + "x" * 500
    torch.save({key: torch.eye(2).to_sparse()}, tmp_path / "x.pt")
    reason = outcome(tmp_path / "x.pt")
    assert reason is not None
    assert len(reason) < 300
    torch.save({key: torch.zeros(1 << 20)[:: (1 << 20) - 1]}, tmp_path / "x.pt")
    reason = outcome(tmp_path / "x.pt")
    assert reason is not None
    assert len(reason) < 300
