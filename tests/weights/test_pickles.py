"""The pickle machine beside Python's own, on a trainer's files, and on files that try something."""

import io
import pickle
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from app.errors import UnsupportedCheckpoint
from app.weights.files import open_weights
from app.weights.machine import MOST_STEPS
from app.weights.pickles import OPCODES, read_pickle
from app.weights.rebuilds import Global, Opaque
from tests.store.hostile import CORPUS, PROOF, alone, integer, legacy, state, tensor, text, zipped
from tests.store.lightning import installed, save_lightning

STATE = {"encoder.x": torch.arange(6.0).reshape(2, 3), "decoder.x": torch.ones(4, dtype=torch.float16)}
PLAIN: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "integers": [0, -1, 255, 256, 65535, 65536, -(1 << 31), 1 << 31, 1 << 70, -(1 << 70)],
    "floats": [0.0, -1.5, 1e300],
    "texts": ["", "x", "é", "\N{GRINNING FACE}", "a\nb\\u", "x" * 300],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
    "nested": {"a": {"b": [[], {}, ()]}},
}


def read(data: bytes) -> object:
    return read_pickle(io.BufferedReader(io.BytesIO(data)), len(data)).value


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_are_those_of_pythons_pickle(protocol):
    assert read(pickle.dumps(PLAIN, protocol)) == PLAIN


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes(protocol):
    values = {"a": b"", "b": b"x" * 300}
    assert read(pickle.dumps(values, protocol)) == values


def test_a_bytearray_and_the_large_forms():
    assert read(alone(b"\x96\x02" + bytes(7) + b"ab")) == b"ab"
    assert read(alone(b"\x8e\x02" + bytes(7) + b"ab")) == b"ab"
    assert read(alone(b"\x8d\x02" + bytes(7) + b"ab")) == "ab"
    assert read(alone(b"B\x02\0\0\0ab")) == b"ab"
    assert read(alone(b"\x8b\x02\0\0\0\x00\x01")) == 256


def test_what_python_2_wrote():
    assert read(b"(dp0\nS'a\\n'\np1\nL5L\nsS\"b\"\nI01\nsg1\nF1.5\ns.") == {"a\\n": 1.5, "b": True}
    assert read(b"\x80\x02}q\x00U\x01\xe9K\x01s.") == {"é": 1}
    assert read(b"\x80\x02T\x02\0\0\0ab.") == "ab"
    assert read(pickle.dumps(OrderedDict(a=1), 2).replace(b"ccollections", b"ccollections")) == {"a": 1}
    assert read(b"ccollections\nOrderedDict\n((lp0\n(lp1\nS'a'\naI1\naatR.") == {"a": 1}


def test_halves_of_surrogate_pairs_become_text_that_can_be_sent():
    for protocol in range(6):
        value = read(pickle.dumps({"a\udcff": "\ud800"}, protocol))
        assert isinstance(value, dict)
        for half in (*value, *value.values()):
            half.encode()


def test_stack_opcodes():
    assert read(alone(b"](K\x01K\x021" + b"K\x03a")) == [3]
    assert read(alone(b"K\x01(0")) == 1
    assert read(alone(b"K\x01K\x020")) == 1
    assert read(alone(b"](K\x012e")) == [1, 1]
    assert read(alone(b"(K\x01K\x02l")) == [1, 2]
    assert read(alone(b"(" + text("a") + b"K\x01d")) == {"a": 1}


def test_globals_are_names():
    name = read(alone(b"cos\nsystem\n"))
    assert name == Global("os.system")
    assert not callable(name)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_objects_are_inert(protocol):
    with installed() as classes:
        data = pickle.dumps({"a": classes["ModelCheckpoint"](), "b": {1, 2}, "c": frozenset({3})}, protocol)
    value = read(data)
    assert isinstance(value, dict)
    assert {type(item) for item in value.values()} == {Opaque}
    assert "ModelCheckpoint" in value["a"].what


def test_only_text_keys_stay():
    assert read(pickle.dumps({1: 2, "a": 3, (1, 2): 4, b"x": 5}, 4)) == {"a": 3}


def test_the_opcodes_are_pythons():
    known = {
        getattr(pickle, name)
        for name in pickle.__all__
        if name.isupper() and isinstance(getattr(pickle, name), bytes) and len(getattr(pickle, name)) == 1
    }
    left = {pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER}
    assert OPCODES.keys() == known - left - {pickle.STOP}


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_lightning_checkpoint(tmp_path, older, protocol):
    path = tmp_path / "last.ckpt"
    save_lightning(path, STATE, older, protocol)
    before = set(sys.modules)
    header = open_weights(path)
    assert {key: info.shape for key, info in header.tensors.items()} == {"encoder.x": (2, 3), "decoder.x": (4,)}
    assert header.others == {}
    for key, value in open_weights(path).read(STATE):
        assert torch.equal(value, STATE[key])
        assert value.dtype is STATE[key].dtype
    assert set(sys.modules) == before


def test_a_whole_model_is_named(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pt")
    with pytest.raises(UnsupportedCheckpoint, match=r"an object of class torch\.nn\.modules\.linear\.Linear where"):
        open_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_hostile_files(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.ckpt"
    path.write_bytes(case.build())
    begin = time.perf_counter()
    with pytest.raises(UnsupportedCheckpoint) as caught:
        open_weights(path)
    assert case.reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert time.perf_counter() - begin < 20  # seconds: nothing quadratic
    assert not Path(PROOF).exists()
    with pytest.raises(UnsupportedCheckpoint):
        list(open_weights(path).read(["x"]))
    assert not Path(PROOF).exists()


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from app.errors import UnsupportedCheckpoint
from app.weights.files import open_weights
from tests.store.hostile import CORPUS

path = Path(sys.argv[1])
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
room = int(status["VmSize"].split()[0]) * 1024 + (320 << 20)
told = 0
for case in CORPUS:
    path.write_bytes(case.build())
    resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
    try:
        open_weights(path)
    except UnsupportedCheckpoint:
        told += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert told == len(CORPUS), told
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_hostile_files_in_320_mib(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "x.ckpt")], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_pickle_in_a_storage_is_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    body = pickle.dumps(Path("x"), 2) + alone(b"cos\nsystem\n" + text(f"touch {PROOF}") + b"\x85R")
    body += bytes(-len(body) % 4)
    (tmp_path / "x.pt").write_bytes(zipped(state(x=tensor(numel=len(body) // 4, shape=(len(body) // 4,))), {"0": body}))
    [(_, value)] = open_weights(tmp_path / "x.pt").read(["x"])
    assert value.view(torch.uint8).numpy().tobytes() == body
    assert not Path(PROOF).exists()


def test_legal_but_large_pickles_stay_within_the_steps():
    count = 12_000  # tensors: more than weights, averages and an optimiser's state of SDXL
    data = state(**{f"key{i}": tensor(str(i)) for i in range(count)})
    value = read(data)
    assert isinstance(value, dict)
    assert len(value) == count
    with pytest.raises(UnsupportedCheckpoint, match="steps"):
        read(alone(b"]0" * (MOST_STEPS // 2) + b"N"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"0",
        b"t",
        b"e",
        b"a",
        b"]a",
        b"s",
        b"}s",
        b"}(Nu",
        b"R",
        b"NR",
        b"NNR",
        b"b",
        b"NNb",
        b"\x81",
        b"NN\x81",
        b"NNN\x92",
        b"\x93",
        b"NN\x93",
        b"h\x00",
        b"q\x00",
        b"gx\n",
        b"px\n",
        b"p-1\n",
        b"Ix\n",
        b"Fx\n",
        b"V\\ud\n",
        b"c\xff\nx\n",
        b"cx",
        b"o",
        b"(o",
        b"(ios\n",
        b"Q",
        b"NQ",
        b"\x80\x09",
        b"1",
        b"2",
        b"\x90",
        b"\x91",
        b"]\x90",
        integer(1) + b"(K\x01e",
    ],
    ids=ascii,
)
def test_malformed_pickles(body):
    with pytest.raises(UnsupportedCheckpoint, match=r"not a sound pickle|truncated|asks to call|memo"):
        read(b"\x80\x02" + body + b".")


def test_names_of_a_file_stay_on_one_line():
    long = "x" * 3000
    with pytest.raises(UnsupportedCheckpoint) as caught:
        read(alone(text("a\x1b[31m\r") + text(f"b\n{long}") + b"\x93)R"))
    assert len(str(caught.value)) < 400
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("keys", [b"N.", b"K\x01.", alone(b"(K\x01l"), alone(b"(" + text("1") + b"l")])
def test_a_list_of_storages_that_is_none(tmp_path, keys):
    (tmp_path / "x.pt").write_bytes(legacy(state(x=tensor()), keys))
    with pytest.raises(UnsupportedCheckpoint, match="storages"):
        open_weights(tmp_path / "x.pt")
