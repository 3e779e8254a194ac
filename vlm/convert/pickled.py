"""Reads the pickle inside a PyTorch file as data: a small interpreter that can name tensors and nothing else.

No pickle machinery of Python runs and nothing is ever imported. A reference to a class or function is a pair of
names; the few that PyTorch uses to describe tensors are looked up in a fixed table, and any other is refused, or on
request becomes an inert record of what the file says about it. Memory and time are bounded by the file: opcode count,
line length and nesting cannot be used as bombs.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import Any, cast

import ml_dtypes
import numpy as np

from vlm.errors import UserError

MAX_OPCODES = 500_000
MAX_STRING = 64 * 2**20
MAX_LINE = 4096

_STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "UntypedStorage": np.dtype(np.uint8),
}
_DTYPES = {
    **{n: np.dtype(n) for n in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat block of bytes in the file: `size` elements of `dtype` under the name `key`."""

    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A strided tensor over a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or function that the pickle refers to; never looked up outside this module's tables."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1]


class Record(dict):
    """An object, as the dictionary of its attributes: of a TorchScript archive, or of a class that is not looked up."""


class _Refused(Exception):
    """The pickle does something else than describing tensors."""


class _Reader:
    """Bounded file interface over bytes, for `pickletools.genops`."""

    def __init__(self, data: memoryview, position: int):
        self.data, self.position = data, position

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if size > MAX_STRING:
            raise _Refused(f"string of {size} bytes")
        chunk = bytes(self.data[self.position : self.position + size])
        self.position += len(chunk)
        return chunk

    def readline(self) -> bytes:
        line = bytes(self.data[self.position : self.position + MAX_LINE])
        end = line.find(b"\n") + 1
        if not end:
            raise _Refused("line without an end")
        self.position += end
        return line[:end]


def load(data: memoryview, position: int = 0, *, source: str = "pickle", objects: bool = False) -> tuple[Any, int]:
    """Interprets one pickle and returns (value, position after it).

    The value is made of dict, list, tuple, str, numbers, None, `Storage`, `StoredTensor` and `Record`.

    Args:
        objects: unknown objects become records of their attributes, and what unknown functions would return an empty
            record. Nothing of them is looked up or run in either case.

    Raises:
        UserError: the pickle is damaged, or contains anything that is not a tensor or a plain container (with
            `objects`: uses instructions that PyTorch does not).
    """
    reader = _Reader(data, position)
    machine = _Machine(objects)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(cast(Any, reader))):
            if count == MAX_OPCODES:
                raise _Refused(f"more than {MAX_OPCODES:,} instructions")
            machine.step(opcode.name, argument)
        return machine.result(), reader.position
    except _Refused as error:
        raise UserError(f"{source}: refused: {error}; only tensors and plain containers are accepted") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        raise UserError(f"{source}: damaged, the pickle inside cannot be read") from None


class _Machine:
    """Stack, memo and the instructions that PyTorch's writers emit."""

    def __init__(self, objects: bool = False):
        self.objects = objects
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self.stack) != 1 or self.marks:
            raise ValueError("unbalanced")
        return self.stack[0]

    def step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _VALUES:
            self.stack.append(_VALUES[name]())
        elif name in _INSTRUCTIONS:
            _INSTRUCTIONS[name](self, argument)
        elif self.objects and name in _SETS:
            _SETS[name](self)
        else:
            raise _Refused(f"pickle instruction {name}")

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """Everything above the last mark."""
        items, self.stack = self.stack, self.marks.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return items

    def memoize(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def set_items(self, pairs: list[Any] | tuple[Any, ...]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise TypeError
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(key, str | int | float | bytes | None):  # others cannot name a tensor
                target[key] = value

    def append_items(self, items: list[Any] | tuple[Any, ...]) -> None:
        if self.objects and isinstance(self.stack[-1], Record):  # a kind of list, of which only attributes are kept
            return
        if not isinstance(self.stack[-1], list):
            raise TypeError
        self.stack[-1].extend(items)

    def reference(self, module: Any, name: Any) -> None:
        reference = _Name(_text(module), _text(name))
        if not self.objects and not _is_known(reference):
            raise _Refused(f"a reference to {reference}")
        self.stack.append(reference)

    def reduce(self, _: Any) -> None:
        function, arguments = self.pop(2)
        if isinstance(function, _Name) and isinstance(arguments, tuple) and function in _FUNCTIONS:
            self.stack.append(_FUNCTIONS[function](*arguments))
        elif self.objects:
            is_set = isinstance(function, _Name) and function in _SET_TYPES
            self.stack.append(list(*arguments) if is_set else Record())
        else:
            raise _Refused(f"a call of {function if isinstance(function, _Name) else 'no known function'}")

    def new_object(self, _: Any) -> None:
        cls, arguments = self.pop(2)
        if self.objects:
            self.stack.append(Record())
            return
        known = isinstance(cls, _Name) and (_is_script_class(cls) or cls in _PLAIN_CLASSES)
        if not known or arguments != ():
            raise _Refused(f"creation of an object of {cls if isinstance(cls, _Name) else 'an unknown class'}")
        self.stack.append(Record())

    def build(self, _: Any) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Record) and isinstance(state, dict):
            target.update(state)
        elif type(target) is not dict and not self.objects:
            # an OrderedDict's `_metadata` is dropped, nothing else has a state
            raise _Refused("a change of an object's state")

    def persistent(self, _: Any) -> None:
        (identifier,) = self.pop(1)
        if self.objects and identifier[0] == "module":  # a class, with its source code, in the format before 1.6
            self.stack.append(identifier[1])
            return
        kind, cls, key, _location, size, *views = identifier
        if kind != "storage" or not isinstance(cls, _Name) or any(view is not None for view in views):
            raise _Refused("an unknown kind of storage")
        if cls.name not in _STORAGES:
            raise _Refused(f"a storage of type {cls}")
        self.stack.append(Storage(_text(key), _STORAGES[cls.name], _count(size)))


_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_STRINGS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING")
_CONSTANTS = frozenset((*_NUMBERS, *_STRINGS, "BINBYTES", "SHORT_BINBYTES"))
_VALUES: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_INSTRUCTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda machine, argument: None),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.memoize),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.items())),
    "TUPLE1": lambda machine, _: machine.push(machine.pop(1)),
    "TUPLE2": lambda machine, _: machine.push(machine.pop(2)),
    "TUPLE3": lambda machine, _: machine.push(machine.pop(3)),
    "LIST": lambda machine, _: machine.push(machine.items()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.items()),
    "APPEND": lambda machine, _: machine.append_items(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append_items(machine.items()),
    "GLOBAL": lambda machine, argument: machine.reference(*argument.rsplit(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.reference(*machine.pop(2)),
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.new_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


_PLAIN_CLASSES = [_Name("argparse", "Namespace")]  # training scripts put their options beside the weights
_SETS: dict[str, Callable[[_Machine], None]] = {  # as lists: a file's values need not be hashable
    "EMPTY_SET": lambda machine: machine.push([]),
    "FROZENSET": lambda machine: machine.push(machine.items()),
    "ADDITEMS": lambda machine: machine.append_items(machine.items()),
}
_SET_TYPES = [_Name(module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")]


def _is_script_class(name: _Name) -> bool:
    return name.module == "__torch__" or name.module.startswith("__torch__.")


def _is_known(reference: _Name) -> bool:
    """Whether a reference is one of PyTorch's words for describing tensors."""
    storage = reference.module in ("torch", "torch.storage", "torch.cuda") and reference.name in _STORAGES
    dtype = reference.module == "torch" and reference.name in _DTYPES
    marker = reference in (_Name("torch.nn.parameter", "Parameter"), _Name("torch", "Tensor"))
    plain = reference in _FUNCTIONS or reference in _PLAIN_CLASSES
    return storage or dtype or marker or plain or _is_script_class(reference)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    return _strided(storage, storage.dtype, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> StoredTensor:
    if not isinstance(dtype, _Name) or dtype.name not in _DTYPES:
        raise _Refused("a tensor of an unknown type")
    return _strided(storage, _DTYPES[dtype.name], offset, shape, strides)


def _strided(storage: Any, dtype: np.dtype, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    """Checks that the view lies inside its storage and is not larger than it (no zero-stride bombs)."""
    if not isinstance(storage, Storage):
        raise TypeError
    shape, strides = tuple(map(_count, shape)), tuple(map(_count, strides))
    tensor = StoredTensor(storage, _count(offset), shape, strides, dtype)
    if len(shape) != len(strides) or len(shape) > 16:
        raise ValueError
    available = storage.size * storage.dtype.itemsize // dtype.itemsize
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if tensor.size > available or (tensor.size and last >= available):
        raise _Refused(f"a tensor of {tensor.size} elements over a storage of {available}")
    return tensor


def _parameter(tensor: Any, *_: Any) -> StoredTensor:
    if not isinstance(tensor, StoredTensor):
        raise TypeError
    return tensor


def _typed(function: Any, _type: Any, arguments: Any, *_: Any) -> StoredTensor:
    if function not in _TENSORS:
        raise _Refused("a tensor subclass")
    return _TENSORS[function](*arguments)


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    return {key: value for key, value in pairs if isinstance(key, str | int)}


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_LINE:
        raise TypeError
    return value


_TENSORS: dict[_Name, Callable[..., StoredTensor]] = {
    _Name("torch._utils", "_rebuild_tensor"): _tensor,
    _Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    _Name("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    _Name("torch._utils", "_rebuild_parameter"): _parameter,
    _Name("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}
_FUNCTIONS: dict[_Name, Callable[..., Any]] = {
    **_TENSORS,
    _Name("torch._tensor", "_rebuild_from_type_v2"): _typed,
    _Name("collections", "OrderedDict"): _ordered,
    _Name("torch", "Size"): lambda values: tuple(map(_count, values)),
    _Name("torch", "device"): lambda *_: None,
    **{
        _Name("torch.jit._pickle", name): lambda value, *_: value
        for name in ("restore_type_tag", "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
    },
}
