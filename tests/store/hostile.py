"""Files that try something, and what they are told: pickles written opcode by opcode, zip files with lies in them."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

PROOF = "hostile-proof"  # what the code of these files would make in the working directory
COMMAND = f"touch {PROOF}"
ORDERED = b"ccollections\nOrderedDict\n"
FLOATS = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


@dataclass(frozen=True)
class Hostile:
    """A file: its bytes, what it tries, and words of the answer."""

    name: str
    tries: str
    build: Callable[[], bytes]
    reason: str


# --------------------------------------------------------------------------------------------------------- pickles
def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(data)]) + data


def integers(values: tuple[int, ...]) -> bytes:
    return pickle.MARK + b"".join(map(integer, values)) + pickle.TUPLE


def called(name: str, *arguments: bytes) -> bytes:
    """REDUCE of a global with these arguments."""
    module, _, plain = name.rpartition(".")
    return f"c{module}\n{plain}\n".encode() + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def storage(key: str = "0", numel: int = 4, kind: bytes = FLOATS) -> bytes:
    names = text("storage") + kind + text(key) + text("cpu") + integer(numel)
    return pickle.MARK + names + pickle.TUPLE + pickle.BINPERSID


def tensor(
    key: str = "0",
    numel: int = 4,
    shape: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    kind: bytes = FLOATS,
) -> bytes:
    arguments = storage(key, numel, kind) + integer(offset) + integers(shape) + integers(stride)
    hooks = ORDERED + pickle.EMPTY_TUPLE + pickle.REDUCE
    return REBUILD + pickle.MARK + arguments + pickle.NEWFALSE + hooks + pickle.TUPLE + pickle.REDUCE


def state(**entries: bytes) -> bytes:
    """A pickled dict of these values."""
    items = b"".join(text(key) + value for key, value in entries.items())
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS + pickle.STOP


def alone(value: bytes) -> bytes:
    return pickle.PROTO + b"\x04" + value + pickle.STOP


# ------------------------------------------------------------------------------------------------------ containers
def records(entries: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return buffer.getvalue()


def zipped(pickled: bytes, storages: Mapping[str, bytes] | None = None, **more: bytes) -> bytes:
    """A zip file as torch.save's, with one storage of four floats."""
    storages = {"0": b"\0" * 16} if storages is None else storages
    entries = {"x/data.pkl": pickled, "x/byteorder": b"little", "x/version": b"3\n"}
    return records(entries | {f"x/data/{key}": data for key, data in storages.items()} | more)


def legacy(pickled: bytes, keys: object = ("0",), counts: tuple[int, ...] = (4,), data: bytes = b"\0" * 16) -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    names = keys if isinstance(keys, bytes) else pickle.dumps(list(keys), 2)
    return b"".join([*head, pickled, names, *(struct.pack("<q", count) + data for count in counts)])


def patched(data: bytes, name: str, offset: int, value: bytes, central: bool = True) -> bytes:
    """Overwrites bytes of a record's header, in the central directory or before the record itself."""
    magic, fixed = (b"PK\x01\x02", 46) if central else (b"PK\x03\x04", 30)
    at = data.index(magic)
    while data[at + fixed : at + fixed + len(name)] != name.encode():
        at = data.index(magic, at + 1)
    return data[: at + offset] + value + data[at + offset + len(value) :]


def _many_records() -> bytes:
    one = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", *(0,) * 9, 1, *(0,) * 6) + b"x"
    count = 200_000
    begin = len(sound := zipped(state(x=tensor())))
    directory = one * count
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), begin)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, begin + len(directory), 1)
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return sound + directory + end64 + locator + end


def _twice() -> bytes:
    data = records({"x/data.pkl": state(x=tensor()), "y/data.pkl": state(x=called("os.system", text(COMMAND)))})
    return data.replace(b"y/data.pkl", b"x/data.pkl")


def _overlapping() -> bytes:
    data = zipped(state(x=tensor()), {"0": b"\0" * 16, "1": b"\0" * 16})
    header = data.index(b"PK\x03\x04", data.index(b"x/version"))
    return patched(data, "x/data/1", 42, struct.pack("<I", header))


def _directory_of_10_gb() -> bytes:
    data = zipped(state(x=tensor()))
    return data[:-10] + struct.pack("<I", 0xFFFFFFF0) + data[-6:]


def _renamed(name: str) -> bytes:
    return records({"x/data.pkl": state(x=tensor()), "x/data/0": b"\0" * 16, name: b"root::0:0::/:/bin/sh"})


def _script() -> bytes:
    return records({"x/data.pkl": state(x=tensor()), "x/constants.pkl": alone(b")"), "x/code/__torch__.py": b"exit()"})


def _tar() -> bytes:
    return b"pickle".ljust(257, b"\0") + b"ustar\x0000".ljust(255, b"\0")


# ---------------------------------------------------------------------------------------------------------- corpus
def _call(name: str, *arguments: bytes, tries: str = "", reason: str = "") -> Hostile:
    arguments = arguments or (text(COMMAND),)
    body = state(a=tensor(), x=called(name, *arguments))
    return Hostile(name, tries or "a call by REDUCE", lambda: zipped(body), reason or f"asks to call {name},")


def _body(name: str, tries: str, body: Callable[[], bytes], reason: str) -> Hostile:
    return Hostile(name, tries, lambda: zipped(body()), reason)


def _shared(body: bytes, times: int, use: bytes) -> bytes:
    """A value that is made once and used many times."""
    return alone(body + pickle.MEMOIZE + use * times)


CORPUS = (
    _call("os.system"),
    _call("posix.system"),
    _call("nt.system"),
    _call("builtins.eval"),
    _call("builtins.exec"),
    _call("builtins.__import__"),
    _call("builtins.getattr", b"csys\nmodules\n", text("get"), reason="builtins.getattr"),
    _call("__builtin__.eval", tries="the same under Python 2's name", reason="builtins.eval"),
    _call("subprocess.Popen"),
    _call("runpy.run_path"),
    _call("importlib.import_module"),
    _call("webbrowser.open"),
    _call("operator.attrgetter"),
    _call("_operator.getitem", b"cos\nenviron\n", text("HOME"), tries="an element of a global"),
    _call("torch.load"),
    _call("torch.hub.load"),
    _call("torch.storage._load_from_bytes", pickle.dumps(b"x", 3)[2:-1], tries="a pickle inside the pickle"),
    _call("numpy.testing._private.utils.runstring"),
    _call(
        "torch._tensor._rebuild_from_type_v2",
        b"cos\nsystem\n" + b"ctorch\nTensor\n" + text(COMMAND) + pickle.TUPLE1 + b"}",
        tries="a call through a rebuild function",
        reason="asks to call os.system",
    ),
    _body(
        "STACK_GLOBAL",
        "a call in protocol 4",
        lambda: alone(text("os") + text("system") + pickle.STACK_GLOBAL + text(COMMAND) + b"\x85R"),
        "asks to call os.system",
    ),
    _body("INST", "a call by INST", lambda: alone(b"(" + text(COMMAND) + b"ios\nsystem\n"), "os.system"),
    _body("OBJ", "a call by OBJ", lambda: alone(b"(cos\nsystem\n" + text(COMMAND) + b"o"), "os.system"),
    _body(
        "call of a call",
        "functools.partial(os.system, ...)()",
        lambda: alone(called("functools.partial", b"cos\nsystem\n", text(COMMAND)) + b")R"),
        "the result of another call (functools.partial)",
    ),
    _body(
        "BUILD on a class",
        "an attribute of a class set",
        lambda: alone(b"ccollections\nOrderedDict\n}" + text("x") + b"Nsb"),
        "state for collections.OrderedDict",
    ),
    _body("EXT1", "copyreg's table of extensions", lambda: alone(b"\x82\x01"), "opcode b'\\x82'"),
    _body("PERSID", "a persistent id of text", lambda: alone(b"Phello\n"), "opcode b'P'"),
    _body("NEXT_BUFFER", "a buffer that is not there", lambda: alone(b"\x97"), "opcode b'\\x97'"),
    _body("persistent id", "an id of its own kind", lambda: alone(text("file") + b"\x85Q"), "persistent id"),
    Hostile("legacy, object", "os.system", lambda: legacy(state(x=called("os.system", text(COMMAND)))), "os.system"),
    Hostile("legacy, first", "os.system", lambda: alone(called("os.system", text(COMMAND))), "os.system"),
    Hostile(
        "legacy, keys",
        "os.system in the list of storages",
        lambda: legacy(state(x=tensor()), alone(called("os.system", text(COMMAND)))),
        "os.system",
    ),
    # time and memory
    _body("text of 4 GB", "a length without bytes", lambda: alone(b"X\xff\xff\xff\xff"), "wants 4294967295 bytes"),
    _body("bytes of 10 GB", "likewise", lambda: alone(b"\x8e" + struct.pack("<Q", 10 << 30)), "wants 10737418240"),
    _body("bytearray of 2^63", "likewise", lambda: alone(b"\x96" + struct.pack("<Q", 1 << 63)), "wants 92233720368"),
    _body("integer of 2 GB", "likewise", lambda: alone(b"\x8b\xff\xff\xff\x7f"), "integer of 2147483647 bytes"),
    _body("integer of 16 MB", "a slow one, in text", lambda: alone(b"I" + b"9" * (16 << 20) + b"\n"), "endless line"),
    _body("memo place 2^31", "a memo as large", lambda: alone(b"Nr\xff\xff\xff\x7f"), "place 2147483647"),
    _body("memo place 10^18", "likewise, in text", lambda: alone(b"Np" + b"9" * 18 + b"\n"), "place 9999"),
    _body("60 million lists", "3.8 GB from 60 MB", lambda: alone(b"]" * 60_000_000), "steps"),
    _body("70 million bytes", "a pickle without end", lambda: b"]0" * 35_000_000, "steps"),
    _body(
        "names of 3 GB",
        "3000 globals of one text of 1 MiB",
        lambda: alone(text("a" * (1 << 20)) + b"\x94" + (b"h\x00h\x00" + pickle.STACK_GLOBAL) * 3000),
        "names classes in 2097153 characters",
    ),
    _body(
        "names of 600 MB",
        "160,000 globals of one text of 2 kB",
        lambda: alone(text("a" * 2000) + b"\x94" + (b"h\x00h\x00" + pickle.STACK_GLOBAL) * 160_000),
        "names classes in 671",
    ),
    _body(
        "reasons of reasons",
        "30,000 tensors, each in the one before",
        lambda: alone(REBUILD + b"q\x00" + pickle.EMPTY_SET + b"q\x01" + b"h\x00(h\x01K\x00))tRq\x01" * 30_000),
        "no tensors",
    ),
    _body("deep nesting", "a recursion of 450,000", lambda: alone(b")" + b"\x85" * 450_000), "tuple where"),
    _body("billion laughs", "2^1000 leaves", lambda: alone(b"]" + b"2\x86\x94" * 1000), "tuple where"),
    _body(
        "shared pairs",
        "100,000 dicts of one list of 300,000 pairs",
        lambda: _shared(b"](" + b"N" * 300_000 + b"e", 100_000, ORDERED + b"h\x00\x85R"),
        "steps",
    ),
    _body(
        "colliding keys",
        "a dict of 200,000 integers of one hash",
        lambda: alone(b"}(" + b"".join(integer(i * ((1 << 61) - 1)) + b"N" for i in range(200_000)) + b"u"),
        "no tensors",
    ),
    _body(
        "a dict in itself", "an endless walk", lambda: alone(b"}\x94" + text("state_dict") + b"h\x00s"), "no tensors"
    ),
    _body("tensor of 10 GB", "claims more than its storage", lambda: state(x=tensor(shape=(10 << 28,))), "16 bytes of"),
    _body(
        "storage of 10 GB",
        "claims more than the file",
        lambda: state(x=tensor(numel=10 << 28, shape=(10 << 28,))),
        "has 16 bytes of 10737418240",
    ),
    _body(
        "expanded tensor",
        "2^80 bytes by strides of 0",
        lambda: state(x=tensor(shape=(1 << 40, 1 << 38), stride=(0, 0))),
        "claims more than the 16",
    ),
    _body("stride beyond", "bytes behind its storage", lambda: state(x=tensor(shape=(2,), stride=(4,))), "claims more"),
    _body("offset beyond", "bytes behind its storage", lambda: state(x=tensor(offset=1)), "claims more"),
    _body("negative offset", "bytes before its storage", lambda: state(x=tensor(offset=-1)), "not a sound pickle"),
    _body("negative stride", "bytes before its storage", lambda: state(x=tensor(stride=(-1,))), "not a sound pickle"),
    _body("negative side", "a size below zero", lambda: state(x=tensor(shape=(-4,))), "not a sound pickle"),
    _body("no such storage", "another file's", lambda: state(x=tensor("../1")), "not in the file"),
    # zip files
    Hostile(
        "deflated", "a bomb: 64 MB from 64 kB", lambda: records({"x/data.pkl": b"]" * (64 << 20)}, 8), "compressed"
    ),
    Hostile(
        "record of 4 GB",
        "a size without bytes",
        lambda: patched(zipped(state(x=tensor())), "x/data/0", 20, b"\xfe\xff\xff\xff" * 2),
        "x/data/0 in the zip file has 4294967294 bytes",
    ),
    Hostile("directory of 4 GB", "likewise", _directory_of_10_gb, "not where it says"),
    Hostile("200,000 records", "a large directory", _many_records, "200000 records"),
    Hostile("../ in a name", "a path that leads out", lambda: _renamed("x/../../../etc/passwd"), "leads elsewhere"),
    Hostile("absolute name", "likewise", lambda: _renamed("/etc/passwd"), "leads elsewhere"),
    Hostile("drive in a name", "likewise", lambda: _renamed("C:/x"), "leads elsewhere"),
    Hostile("the same name twice", "one for the check, one for the load", _twice, "twice"),
    Hostile("overlapping records", "one's bytes in another", _overlapping, "more than lie before"),
    Hostile(
        "two names of a record",
        "another name before the record",
        lambda: patched(zipped(state(x=tensor())), "x/data.pkl", 30, b"y", central=False),
        "lies about x/data.pkl",
    ),
    Hostile(
        "two sizes of a record",
        "another size before the record",
        lambda: patched(zipped(state(x=tensor())), "x/data.pkl", 22, b"\x01\x00\x00\x00", central=False),
        "lies about x/data.pkl",
    ),
    Hostile(
        "encrypted",
        "what a check cannot see",
        lambda: patched(zipped(state(x=tensor())), "x/data.pkl", 8, b"\x01"),
        "encrypted",
    ),
    Hostile(
        "with a comment",
        "an end that readers find differently",
        lambda: zipped(state(x=tensor()))[:-2] + b"\x04\x00PK\x05\x06",
        "without its end",
    ),
    Hostile("TorchScript", "a program", _script, "TorchScript"),
    Hostile("no data.pkl", "another zip file", lambda: records({"word/document.xml": b"<x/>"}), "0 data.pkl"),
    Hostile("two data.pkl", "which?", lambda: records({"x/data.pkl": b".", "y/data.pkl": b"."}), "2 data.pkl"),
    Hostile("tar", "torch before 0.1.10: pickles in tar", _tar, "tar file"),
    Hostile(
        "big-endian",
        "numbers the other way",
        lambda: records({"x/data.pkl": state(x=tensor()), "x/byteorder": b"big"}),
        "byte order is big",
    ),
    # the older container
    Hostile(
        "legacy, negative size", "a storage below zero", lambda: legacy(state(x=tensor()), counts=(-4,)), "of -16 bytes"
    ),
    Hostile(
        "legacy, 10 GB", "a storage without bytes", lambda: legacy(state(x=tensor()), counts=(10 << 28,)), "truncated"
    ),
    Hostile(
        "legacy, other keys", "storages of no tensor", lambda: legacy(state(x=tensor()), ("1",)), "not its pickle's"
    ),
    Hostile(
        "legacy, a key twice", "one for two", lambda: legacy(state(x=tensor()), ("0", "0"), (4, 4)), "not its pickle's"
    ),
    Hostile("legacy, short", "a storage cut off", lambda: legacy(state(x=tensor()))[:-1], "truncated"),
)


def saved(content: object, older: bool = False) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not older)
    return buffer.getvalue()
