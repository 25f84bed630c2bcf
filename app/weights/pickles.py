"""Reads the pickle of a checkpoint without Python's unpickler: nothing is imported, nothing called, little allocated.

The opcodes of protocols 0 to 5, closed by construction: the values that they can make are the plain ones of the format
and the descriptions of `rebuilds`. Globals stay names. A class that is instantiated (NEWOBJ) becomes an inert
placeholder, as files of trainers are full of them; a function that is called is one of the tables of `rebuilds` or an
error that names it. Opcodes: the standard library's pickletools.
"""

import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from types import MappingProxyType

from app.errors import UnsupportedCheckpoint
from app.weights.machine import MOST_STEPS, Machine
from app.weights.rebuilds import Global, Opaque, StorageRef, TensorRef, call, is_entry, kind, storage_of

LONGEST_LINE = 4096  # bytes of what protocol 0 writes as text
LONGEST_INTEGER = 128  # bytes; torch's magic number has 10


@dataclass(frozen=True)
class Unpickled:
    """What a pickle holds, and the storages that it names by key."""

    value: object
    storages: Mapping[str, StorageRef]


def read_pickle(file: BufferedReader, length: int, most_steps: int = MOST_STEPS) -> Unpickled:
    """The pickle that begins here and has at most `length` bytes; the file stands behind it afterwards.

    Dicts keep the entries with text keys. Cyclic and deep values are possible: do not recurse into them. Raises
    UnsupportedCheckpoint with a one-line reason for what is malformed, truncated, too large, or asks for a call.
    """
    machine = Machine(file, length, most_steps)
    try:
        while (code := machine.take(1)) != pickle.STOP:
            machine.spend(1)
            if (act := OPCODES.get(code)) is None:
                raise UnsupportedCheckpoint(f"not a sound pickle: opcode {code!r} at byte {machine.position - 1}")
            act(machine)
        return Unpickled(machine.stack.pop(), machine.storages)
    except (IndexError, KeyError, ValueError, OverflowError, struct.error) as error:
        # an empty stack, a memo that was not set, text that is no number or not UTF-8
        reason = f"{type(error).__name__} at byte {machine.position}"
        raise UnsupportedCheckpoint(f"not a sound pickle: {reason}") from error


def _integer(m: Machine, size: int) -> None:
    if size > LONGEST_INTEGER:
        raise UnsupportedCheckpoint(f"refused: the pickle has an integer of {size} bytes")
    m.push(int.from_bytes(m.take(size), "little", signed=True))


def _integer_text(m: Machine) -> None:
    text = m.text(2 * LONGEST_INTEGER).removesuffix(b"L")
    m.push({b"00": False, b"01": True}.get(text, int(text)))


def _string(m: Machine) -> None:
    """Python 2's text, between quotes; its escapes are left alone, as names of tensors have none."""
    m.push(m.text(LONGEST_LINE)[1:-1].decode("latin-1"))


def _unicode(m: Machine) -> None:
    """Text; halves of surrogate pairs, which no answer could carry, are replaced here as in the binary forms."""
    m.push(m.text(LONGEST_LINE).decode("raw-unicode-escape").encode(errors="replace").decode())


def _append(m: Machine, items: list[object]) -> None:
    target = m.stack[-1]
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise UnsupportedCheckpoint(f"not a sound pickle: elements for {kind(target)}")


def _fill(m: Machine, items: list[object]) -> None:
    target = m.stack[-1]
    if isinstance(target, dict):
        target.update({pair[0]: pair[1] for pair in zip(items[::2], items[1::2], strict=True) if is_entry(pair)})
    elif not isinstance(target, Opaque):
        raise UnsupportedCheckpoint(f"not a sound pickle: entries for {kind(target)}")


def _dict(m: Machine) -> None:
    items = m.until_mark()
    m.push({})
    _fill(m, items)


def _new(m: Machine, arguments: int) -> None:
    """An instance of a class: inert, whatever the class, as the class is a name here."""
    for _ in range(arguments):
        m.stack.pop()
    cls = m.stack.pop()
    if not isinstance(cls, Global):
        raise UnsupportedCheckpoint(f"not a sound pickle: an instance of {kind(cls)}")
    m.push({} if cls.name in DICTS else Opaque(f"an object of class {kind(cls)}"))


def _call(m: Machine, function: object, arguments: object) -> None:
    if not isinstance(arguments, tuple):
        raise UnsupportedCheckpoint(f"not a sound pickle: a call with {kind(arguments)} for arguments")
    m.push(call(function, arguments, m.spend))


def _reduce(m: Machine) -> None:
    arguments = m.stack.pop()
    _call(m, m.stack.pop(), arguments)


def _object(m: Machine) -> None:
    """OBJ calls what it names, be it a class or not; INST likewise."""
    items = m.until_mark()
    _call(m, items[0], tuple(items[1:]))


def _instance(m: Machine) -> None:
    function = _global(m, m.text(LONGEST_LINE).decode(), m.text(LONGEST_LINE).decode())
    _call(m, function, tuple(m.until_mark()))


def _build(m: Machine) -> None:
    """The state of an object: dropped. A class's own attributes are no state."""
    m.stack.pop()
    target = m.stack[-1]
    if not isinstance(target, dict | list | Opaque | TensorRef):
        raise UnsupportedCheckpoint(f"not a sound pickle: state for {kind(target)}")


def _global(m: Machine, module: object, name: object) -> Global:
    if type(module) is not str or type(name) is not str:
        raise UnsupportedCheckpoint("not a sound pickle: a global without a name")
    return m.name(OLD_MODULES.get(module, module), name)


def _stack_global(m: Machine) -> None:
    name = m.stack.pop()
    m.push(_global(m, m.stack.pop(), name))


def _tuple(m: Machine, count: int) -> None:
    items = [m.stack.pop() for _ in range(count)]
    m.push(tuple(reversed(items)))


def _pop(m: Machine) -> None:
    if m.stack:
        m.stack.pop()
    else:
        m.until_mark()


def _mark(m: Machine) -> None:
    m.marked.append(m.stack)
    m.stack = []


def _protocol(m: Machine) -> None:
    if (protocol := m.number(1)) > 5:
        raise UnsupportedCheckpoint(f"not a sound pickle: protocol {protocol}; 0 to 5 were expected")


def _inert_set(m: Machine) -> None:
    m.until_mark()
    m.push(Opaque("a set"))


def _storage(m: Machine) -> None:
    storage = storage_of(m.stack.pop())
    if isinstance(storage, StorageRef):
        m.storages.setdefault(storage.key, storage)
    m.push(storage)


OLD_MODULES: Mapping[str, str] = MappingProxyType({"__builtin__": "builtins", "copy_reg": "copyreg"})  # of Python 2
DICTS = frozenset({"builtins.dict", "collections.OrderedDict", "collections.defaultdict"})

OPCODES: Mapping[bytes, Callable[[Machine], object]] = MappingProxyType(
    {
        # values
        pickle.NONE: lambda m: m.push(None),
        pickle.NEWTRUE: lambda m: m.push(True),
        pickle.NEWFALSE: lambda m: m.push(False),
        pickle.INT: _integer_text,
        pickle.LONG: _integer_text,
        pickle.BININT: lambda m: _integer(m, 4),
        pickle.BININT1: lambda m: m.push(m.number(1)),
        pickle.BININT2: lambda m: m.push(m.number(2)),
        pickle.LONG1: lambda m: _integer(m, m.number(1)),
        pickle.LONG4: lambda m: _integer(m, m.number(4)),
        pickle.FLOAT: lambda m: m.push(float(m.text(LONGEST_LINE))),
        pickle.BINFLOAT: lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        pickle.STRING: _string,
        pickle.BINSTRING: lambda m: m.push(m.take(m.number(4)).decode("latin-1")),
        pickle.SHORT_BINSTRING: lambda m: m.push(m.take(m.number(1)).decode("latin-1")),
        pickle.UNICODE: _unicode,
        pickle.SHORT_BINUNICODE: lambda m: m.push(m.take(m.number(1)).decode(errors="replace")),
        pickle.BINUNICODE: lambda m: m.push(m.take(m.number(4)).decode(errors="replace")),
        pickle.BINUNICODE8: lambda m: m.push(m.take(m.number(8)).decode(errors="replace")),
        pickle.SHORT_BINBYTES: lambda m: m.push(m.take(m.number(1))),
        pickle.BINBYTES: lambda m: m.push(m.take(m.number(4))),
        pickle.BINBYTES8: lambda m: m.push(m.take(m.number(8))),
        pickle.BYTEARRAY8: lambda m: m.push(m.take(m.number(8))),
        # containers
        pickle.EMPTY_LIST: lambda m: m.push([]),
        pickle.EMPTY_DICT: lambda m: m.push({}),
        pickle.EMPTY_TUPLE: lambda m: m.push(()),
        pickle.EMPTY_SET: lambda m: m.push(Opaque("a set")),
        pickle.LIST: lambda m: m.push(m.until_mark()),
        pickle.DICT: _dict,
        pickle.TUPLE: lambda m: m.push(tuple(m.until_mark())),
        pickle.TUPLE1: lambda m: _tuple(m, 1),
        pickle.TUPLE2: lambda m: _tuple(m, 2),
        pickle.TUPLE3: lambda m: _tuple(m, 3),
        pickle.FROZENSET: _inert_set,
        pickle.APPEND: lambda m: _append(m, [m.stack.pop()]),
        pickle.APPENDS: lambda m: _append(m, m.until_mark()),
        pickle.ADDITEMS: lambda m: _append(m, m.until_mark()),
        pickle.SETITEM: lambda m: _fill(m, [m.stack.pop(), m.stack.pop()][::-1]),
        pickle.SETITEMS: lambda m: _fill(m, m.until_mark()),
        # stack and memo
        pickle.MARK: _mark,
        pickle.POP: _pop,
        pickle.POP_MARK: lambda m: m.until_mark(),
        pickle.DUP: lambda m: m.push(m.stack[-1]),
        pickle.GET: lambda m: m.push(m.memo[int(m.text(20))]),
        pickle.BINGET: lambda m: m.push(m.memo[m.number(1)]),
        pickle.LONG_BINGET: lambda m: m.push(m.memo[m.number(4)]),
        pickle.PUT: lambda m: m.remember(int(m.text(20))),
        pickle.BINPUT: lambda m: m.remember(m.number(1)),
        pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
        pickle.MEMOIZE: lambda m: m.remember(len(m.memo)),
        # names, objects, storages
        pickle.GLOBAL: lambda m: m.push(_global(m, m.text(LONGEST_LINE).decode(), m.text(LONGEST_LINE).decode())),
        pickle.STACK_GLOBAL: _stack_global,
        pickle.REDUCE: _reduce,
        pickle.OBJ: _object,
        pickle.INST: _instance,
        pickle.NEWOBJ: lambda m: _new(m, 1),
        pickle.NEWOBJ_EX: lambda m: _new(m, 2),
        pickle.BUILD: _build,
        pickle.BINPERSID: _storage,
        # framing
        pickle.PROTO: _protocol,
        pickle.FRAME: lambda m: m.take(8),
    }
)
"""Without PERSID, EXT1, EXT2, EXT4, NEXT_BUFFER and READONLY_BUFFER: torch.save writes none of them."""
