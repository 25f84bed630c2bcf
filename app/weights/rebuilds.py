"""What the globals of a checkpoint's pickle stand for: descriptions of tensors, plain containers, or nothing. No torch.

Nothing here is looked up, imported or called by a name from a file: the names are keys of the tables below, the
functions behind them are written here and make descriptions. Facts: torch/_utils.py, torch/storage.py and
torch/serialization.py (which functions a tensor is pickled with, and their arguments).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from app.errors import UnsupportedCheckpoint
from app.text import short

MOST_DIMS = 8
LARGEST_SIDE = 1 << 40  # elements: keeps sizes and strides within what torch can multiply


@dataclass(frozen=True, slots=True)
class Global:
    """A function or class that the pickle names, `module.name`. It is only ever a name."""

    name: str


@dataclass(frozen=True, eq=False, slots=True)
class Opaque:
    """Whatever is no tensor and no plain container: its state is dropped, `what` remains for errors."""

    what: str


@dataclass(frozen=True, eq=False, slots=True)
class StorageRef:
    """A storage of the file, unread: its key there, and `numel` elements of dtype, a key of `DTYPES`."""

    key: str
    dtype: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that it is said to have."""
        return self.numel * DTYPES[self.dtype]


@dataclass(frozen=True, eq=False, slots=True)
class TensorRef:
    """A tensor of the file, unread; stride and offset count elements of dtype from the storage's beginning."""

    storage: StorageRef
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype]

    @property
    def span(self) -> tuple[int, int]:
        """(first, after the last) byte of the storage that it touches; (0, 0) where it is empty."""
        if 0 in self.shape:
            return 0, 0
        last = self.offset + sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        return self.offset * DTYPES[self.dtype], (last + 1) * DTYPES[self.dtype]


DTYPES: Mapping[str, int] = MappingProxyType(
    {
        "torch.float64": 8,
        "torch.float32": 4,
        "torch.float16": 2,
        "torch.bfloat16": 2,
        "torch.complex64": 8,
        "torch.complex128": 16,
        "torch.float8_e4m3fn": 1,
        "torch.float8_e5m2": 1,
        "torch.float8_e8m0fnu": 1,
        "torch.bool": 1,
        "torch.int64": 8,
        "torch.int32": 4,
        "torch.int16": 2,
        "torch.int8": 1,
        "torch.uint64": 8,
        "torch.uint32": 4,
        "torch.uint16": 2,
        "torch.uint8": 1,
    }
)
"""The dtypes that a pickle names by themselves, and the bytes of one element."""

STORAGES: Mapping[str, str] = MappingProxyType(
    {
        "DoubleStorage": "torch.float64",
        "FloatStorage": "torch.float32",
        "HalfStorage": "torch.float16",
        "BFloat16Storage": "torch.bfloat16",
        "ComplexDoubleStorage": "torch.complex128",
        "ComplexFloatStorage": "torch.complex64",
        "LongStorage": "torch.int64",
        "IntStorage": "torch.int32",
        "ShortStorage": "torch.int16",
        "CharStorage": "torch.int8",
        "ByteStorage": "torch.uint8",
        "BoolStorage": "torch.bool",
        "UntypedStorage": "torch.uint8",
        "QInt8Storage": "torch.int8",  # only quantised tensors have these, which are no dense tensors
        "QUInt8Storage": "torch.uint8",
        "QInt32Storage": "torch.int32",
    }
)
"""The classes of storages, in `torch`, `torch.storage` or, in old files, `torch.cuda`."""

INERT = frozenset(
    {
        *("builtins.set", "builtins.frozenset", "builtins.bytes", "builtins.bytearray", "builtins.complex"),
        *("builtins.range", "builtins.slice", "builtins.object", "builtins.int", "builtins.float", "builtins.str"),
        *("builtins.list", "builtins.tuple", "builtins.long", "builtins.unicode", "_codecs.encode"),
        *("collections.Counter", "collections.deque", "functools.partial", "decimal.Decimal", "fractions.Fraction"),
        *("datetime.date", "datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone"),
        *("pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePath", "uuid.UUID"),
        *("pathlib.PurePosixPath", "pathlib.PureWindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"),
        *("numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"),
        *("numpy.random._pickle.__randomstate_ctor", "numpy.random._pickle.__generator_ctor"),
        *("numpy.random._pickle.__bit_generator_ctor", "torch.device", "torch.Generator"),
        *("torch.serialization._get_layout", "types.GenericAlias"),
    }
)
"""What trainers leave beside the weights by a call: numbers, times, paths, settings, numpy's scalars and arrays, the
state of random generators, bytes in protocol 2 (`_codecs.encode`)."""

INERT_PREFIXES = (
    # callbacks, states and enums of the trainers that these files come from
    "pytorch_lightning.",
    "lightning.",
    "lightning_fabric.",
    "lightning_utilities.",
    "omegaconf.",
    "torch.optim.",
)

REFUSED = (
    "refused: the pickle asks to call {}, and a file that calls functions could run code here; "
    "save its tensors alone, best as .safetensors"
)


def call(function: object, arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    """What a call of the pickle yields; nothing is called.

    `spend` is told how many elements are gone through. Raises UnsupportedCheckpoint, which names the function, for
    every function that is on none of the tables, and for arguments that a rebuild function does not take.
    """
    if not isinstance(function, Global):
        raise UnsupportedCheckpoint(REFUSED.format(f"the result of another call ({short(kind(function))})"))
    name = function.name
    match name, arguments:
        case ("collections.OrderedDict" | "builtins.dict", (list() as pairs,)):
            spend(len(pairs))
            return {pair[0]: pair[1] for pair in pairs if isinstance(pair, list | tuple) and is_entry(pair)}
        case ("collections.OrderedDict" | "collections.defaultdict" | "builtins.dict", _):
            return {}
        case ("torch.Size", (tuple() as sides,)):
            return sides
        case ("operator.getitem" | "_operator.getitem", (Global(name=generic), _)) if generic.startswith("typing."):
            return Opaque(short(generic))  # omegaconf's types: Dict[str, Any]
        case ("copyreg._reconstructor" | "copyreg.__newobj__", (Global(name=cls), *_)):
            return Opaque(f"an object of class {short(cls)}")  # NEWOBJ as protocols 0 and 1 write it
        case ("torch._tensor._rebuild_from_type_v2", (Global() as rebuild, Global(name=subclass), tuple() as inner, _)):
            if rebuild.name == name:
                raise UnsupportedCheckpoint(f"not a sound pickle: {name} of itself")
            known = subclass in {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}
            value = call(rebuild, inner, spend)
            return value if known else Opaque(f"a tensor of class {short(subclass)}")
        case ("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", (value, *_)):
            return value
        case ("torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2", (storage, offset, shape, stride, *_)):
            return tensor(storage, offset, shape, stride)
        case ("torch._utils._rebuild_tensor_v3", (storage, offset, shape, stride, _, _, Global(name=dtype), *_)):
            return tensor(storage, offset, shape, stride, dtype)
        case (
            "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3",
            _,
        ):
            raise UnsupportedCheckpoint(f"not a sound pickle: {name} with {len(arguments)} unfitting arguments")
        case ("torch._utils._rebuild_sparse_tensor" | "torch._utils._rebuild_sparse_csr_tensor", _):
            return Opaque("a sparse tensor")
        case ("torch._utils._rebuild_qtensor", _):
            return Opaque("a quantised tensor")
    if name.startswith("torch._utils._rebuild_") or name in INERT or name.startswith(INERT_PREFIXES):
        return Opaque(short(name))
    raise UnsupportedCheckpoint(REFUSED.format(short(name)))


def storage_of(identity: object) -> object:
    """The storage, or class of a module, that a persistent id of torch.save stands for.

    Raises UnsupportedCheckpoint for ids that torch.save does not write.
    """
    if not isinstance(identity, tuple) or len(identity) > 6:
        raise UnsupportedCheckpoint("not a sound pickle: a persistent id that torch.save does not write")
    match identity:
        case ("storage", Global(name=name), str(key), _, int(numel), *view) if 0 <= numel < 1 << 63:
            module, _, plain = name.rpartition(".")
            if view not in ([], [None]):
                return Opaque("a storage that is a view of another")
            if module not in {"torch", "torch.storage", "torch.cuda"} or plain not in STORAGES:
                return Opaque(f"a {short(name)}")
            return StorageRef(key, STORAGES[plain], numel)
        case ("module", Global(name=name), *_):
            return Global(name)
    raise UnsupportedCheckpoint("not a sound pickle: a persistent id that torch.save does not write")


def tensor(storage: object, offset: object, shape: object, stride: object, dtype: str | None = None) -> object:
    """The description of a dense tensor; an Opaque that says why where its storage cannot hold it.

    Raises UnsupportedCheckpoint where these are no arguments of a tensor.
    """
    if isinstance(storage, Opaque):
        return Opaque(f"a tensor in {short(storage.what)}")  # which may itself be such a tensor
    if not isinstance(storage, StorageRef) or not (_is_sides((offset,)) and _is_sides(shape) and _is_sides(stride)):
        raise UnsupportedCheckpoint("not a sound pickle: a tensor without storage, offset, shape and stride")
    assert isinstance(offset, int)
    assert isinstance(shape, tuple)
    assert isinstance(stride, tuple)
    if len(shape) != len(stride):
        raise UnsupportedCheckpoint(f"not a sound pickle: a tensor with {len(shape)} sides and {len(stride)} strides")
    if dtype is not None and dtype not in DTYPES:
        return Opaque(f"a tensor of dtype {short(dtype)}")
    ref = TensorRef(storage, dtype or storage.dtype, shape, stride, offset)
    room = storage.nbytes
    if max(ref.nbytes, ref.span[1]) > room or any(side > LARGEST_SIDE for side in shape):
        return Opaque(f"a tensor of shape {shape}, which claims more than the {room} bytes of its storage")
    if ref.nbytes == 0 and math.prod(side for side in shape if side) > LARGEST_SIDE:
        return Opaque(f"an empty tensor of shape {shape}")
    return ref


def _is_sides(sides: object) -> bool:
    if not isinstance(sides, tuple) or len(sides) > MOST_DIMS:
        return False
    return all(type(side) is int and 0 <= side < 1 << 63 for side in sides)


def is_entry(pair: list[object] | tuple[object, ...]) -> bool:
    """Whether this is a key and a value that are kept: tensors have names, and other keys may be made to collide."""
    return len(pair) == 2 and type(pair[0]) is str


def kind(value: object) -> str:
    """What a value of the pickle is, for an error."""
    match value:
        case Opaque(what=what):
            return what
        case Global(name=name):
            return short(name)
        case StorageRef():
            return "a storage"
        case TensorRef():
            return "a tensor"
    return type(value).__name__
