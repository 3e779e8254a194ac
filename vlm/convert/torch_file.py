"""Opens weight files of every kind as lazy tensors: safetensors, PyTorch zip and stream formats, sharded folders.

Files are memory-mapped; opening one reads only its index. Nothing in a file is executed (see `pickled`), every
tensor is proven to lie inside the file, and a damaged or hostile file ends in one clear line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vlm.convert import pickled
from vlm.convert.pickled import Record, StoredTensor
from vlm.convert.safetensors_file import open_safetensors
from vlm.convert.views import TensorView, from_array
from vlm.convert.zip_file import stored_members
from vlm.errors import UserError
from vlm.strict import unique_keys
from vlm.tree import listing

_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_START = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number as a pickle of any protocol
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt")
_MAX_ENTRIES = 200_000
_MAX_INDEX_BYTES = 64 * 2**20


def open_tensors(path: str | Path) -> dict[str, TensorView]:
    """Returns the tensors of a weight file or folder by name, lazily.

    Args:
        path: a .safetensors, .bin, .pt or .pth file, an `*.index.json` of shards, or a folder with one of them.
            Checkpoint wrappers ("state_dict", "model", "module" ...) and a common "module." prefix are removed. Of a
            whole pickled module, only the names and tensors that its state dict would have are read.

    Raises:
        UserError: the file is missing, damaged, of an unknown format, or holds anything else than tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = find_weights(path)
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if start.startswith(b"PK\x03\x04"):
        return _open_torch(path, _read_zip)
    if _STREAM_START in start[:32]:
        return _open_torch(path, _read_stream)
    if start[8:9] == b"{":
        return open_safetensors(path)
    raise UserError(f"{path}: {_describe(start)}")


def find_weights(folder: Path) -> Path:
    """Returns the weight file (or shard index) of a folder, preferring safetensors.

    Raises:
        UserError: there is none, or several and none has a usual name.
    """
    for name in _NAMES:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(found) != 1:
        names = f"several: {listing([file.name for file in found])}" if found else "none"
        raise UserError(f"{folder}: expected one weight file ({', '.join(_NAMES[::2])}, *.pt ...), found {names}")
    return found[0]


def _describe(start: bytes) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: download the weights first"
    if start[257:262] == b"ustar" or start.startswith(b"\x80\x02}q"):
        return "the tar format of PyTorch before 0.1.10; save it again with a newer PyTorch"
    return "empty file" if not start else "neither a safetensors nor a PyTorch weight file"


def _open_sharded(index: Path) -> dict[str, TensorView]:
    if index.stat().st_size > _MAX_INDEX_BYTES:
        raise UserError(f"{index}: larger than {_MAX_INDEX_BYTES} bytes")
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=unique_keys)
        weight_map = {str(name): str(file) for name, file in content["weight_map"].items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise UserError(f"{index}: damaged, expected JSON with a 'weight_map'") from None
    tensors: dict[str, TensorView] = {}
    for file in sorted(set(weight_map.values())):
        if PurePosixPath(file).name != file or file in (".", ".."):
            raise UserError(f"{index}: shard {file!r} lies outside the folder")
        shard = open_tensors(index.parent / file)
        twice = sorted(tensors.keys() & shard.keys())
        if twice:
            raise UserError(f"{index}: in several shards: {listing(twice)}")
        tensors |= shard
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise UserError(f"{index}: the shards lack {listing(missing)}")
    return tensors


Locate = Callable[[str], tuple[int, int]]


def _open_torch(path: Path, read: Callable[[Path, np.ndarray], tuple[Any, Locate]]) -> dict[str, TensorView]:
    data = np.memmap(path, np.uint8, "r")
    value, locate = read(path, data)
    stored = _collect(_state_dict(_unwrap(value)))
    if not stored:
        raise UserError(f"{path}: no tensors found")
    if stored and all(name.startswith("module.") for name in stored):  # DistributedDataParallel
        stored = {name.removeprefix("module."): tensor for name, tensor in stored.items()}
    if sum(tensor.size for tensor in stored.values()) > data.size:
        raise UserError(f"{path}: refused: its tensors have more elements than the file has bytes")
    return {name: _view(path, data, name, tensor, locate) for name, tensor in stored.items()}


def _unwrap(value: Any) -> Any:
    """Removes the layers that training scripts put around a state dict: {"model": {...}, "epoch": 3}."""
    for _ in range(4):
        inner = [value[key] for key in _WRAPPERS if isinstance(value, dict) and isinstance(value.get(key), dict)]
        if not inner or _is_module(value) or any(isinstance(entry, StoredTensor) for entry in value.values()):
            break
        value = inner[0]
    return value


def _is_module(value: Any) -> bool:
    """Whether a value is what is left of a pickled `torch.nn.Module`."""
    return isinstance(value, Record) and all(type(value.get(key)) is dict for key in ("_parameters", "_modules"))


def _state_dict(value: Any) -> Any:
    """A pickled module as nested dictionaries of its parameters and buffers; anything else as it is."""
    if not _is_module(value):
        return value
    root: dict[str, Any] = {}
    pending, entries = [(value, root, 0)], 0
    while pending:
        module, tensors, depth = pending.pop()
        parameters, children = module["_parameters"], module["_modules"]
        buffers, transient = module.get("_buffers"), module.get("_non_persistent_buffers_set")
        buffers = buffers if isinstance(buffers, dict) else {}
        transient = transient if isinstance(transient, list) else []
        entries += 1 + sum(map(len, (parameters, children, buffers, transient)))
        if entries > _MAX_ENTRIES or depth > 32:
            raise UserError(f"refused: modules nested deeper than 32, or more than {_MAX_ENTRIES:,} entries")
        left_out = {name for name in transient if isinstance(name, str)}
        named = parameters | {name: entry for name, entry in buffers.items() if name not in left_out}
        tensors |= {name: entry for name, entry in named.items() if isinstance(entry, StoredTensor)}
        for name, child in children.items():
            if _is_module(child):
                tensors[name] = {}
                pending.append((child, tensors[name], depth + 1))
    return root


def _load_pickle(data: memoryview, position: int = 0, *, source: str) -> tuple[Any, int]:
    """As `pickled.load`; a file that is refused for its objects is read as records if it holds a whole module.

    Raises:
        UserError: it holds anything else, then in the words of the refusal.
    """
    try:
        return pickled.load(data, position, source=source)
    except UserError as refused:
        try:
            value, end = pickled.load(data, position, source=source, objects=True)
        except UserError:
            raise refused from None
        if not _is_module(_unwrap(value)):
            raise
        return value, end


def _collect(root: Any) -> dict[str, StoredTensor]:
    """Names every tensor by its dotted path through dictionaries (nested for TorchScript modules)."""
    found: dict[str, StoredTensor] = {}
    entries = 0

    def visit(value: Any, name: str, depth: int) -> None:
        nonlocal entries
        if isinstance(value, StoredTensor):
            if not name or len(name) > 512 or not name.isprintable():
                raise UserError(f"tensor name {name[:64]!r} is not printable text of at most 512 characters")
            if name in found:
                raise UserError(f"tensor {name!r} appears twice")
            found[name] = value
        elif isinstance(value, dict) and depth < 32:
            entries += len(value)
            if entries > _MAX_ENTRIES:  # a few dictionaries that contain one another have any number of paths
                raise UserError(f"refused: more than {_MAX_ENTRIES:,} entries")
            for key, entry in value.items():
                if isinstance(key, str) and isinstance(entry, dict | StoredTensor):
                    visit(entry, f"{name}.{key}" if name else key, depth + 1)

    visit(root, "", 0)
    return found


def _view(path: Path, data: np.ndarray, name: str, tensor: StoredTensor, locate: Locate) -> TensorView:
    start, available = locate(tensor.storage.key)
    needed = tensor.storage.size * tensor.storage.dtype.itemsize
    if available < needed or start + available > data.size:
        raise UserError(f"{path}: tensor {name!r} needs {needed} bytes of storage, found {available}")
    whole = np.ndarray(
        tensor.shape,
        tensor.dtype,
        buffer=data,
        offset=start + tensor.offset * tensor.dtype.itemsize,
        strides=tuple(stride * tensor.dtype.itemsize for stride in tensor.strides),
    )
    return from_array(whole)


def _read_zip(path: Path, data: np.ndarray) -> tuple[Any, Locate]:
    """The format since PyTorch 1.6, and TorchScript archives: NAME/data.pkl and NAME/data/<key>, uncompressed."""
    members = stored_members(path, data)
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UserError(f"{path}: a zip file, but not one that PyTorch wrote (no data.pkl)")
    root = pickles[0].removesuffix("data.pkl")
    order = members.get(root + "byteorder")
    if order and bytes(data[order[0] : order[0] + order[1]]) != b"little":
        raise UserError(f"{path}: written on a big-endian machine, expected little-endian")
    start, size = members[pickles[0]]
    value, _ = _load_pickle(data.data[start : start + size], source=str(path))

    def locate(key: str) -> tuple[int, int]:
        if f"{root}data/{key}" not in members:
            raise UserError(f"{path}: storage {key!r} is missing")
        return members[f"{root}data/{key}"]

    return value, locate


def _read_stream(path: Path, data: np.ndarray) -> tuple[Any, Locate]:
    """The format before 1.6: five pickles (magic, version, system, tensors, storage keys), then the storages."""
    view, source = data.data, str(path)
    magic, position = pickled.load(view, source=source)
    version, position = pickled.load(view, position, source=source)
    system, position = pickled.load(view, position, source=source)
    if magic != _STREAM_MAGIC or version != 1001 or not isinstance(system, dict):
        raise UserError(f"{path}: unknown version of the PyTorch stream format")
    if not system.get("little_endian", True):
        raise UserError(f"{path}: written on a big-endian machine, expected little-endian")
    value, position = _load_pickle(view, position, source=source)
    keys, position = pickled.load(view, position, source=source)
    sizes = _storage_bytes(value)
    if not isinstance(keys, list) or any(key not in sizes for key in keys):
        raise UserError(f"{path}: damaged list of storages")
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        count, width = int.from_bytes(view[position : position + 8], "little"), sizes[key]
        places[key] = (position + 8, count * width)
        position += 8 + count * width
        if position > len(view):
            raise UserError(f"{path}: truncated in storage {key!r}")

    def locate(key: str) -> tuple[int, int]:
        if key not in places:
            raise UserError(f"{path}: storage {key!r} is missing")
        return places[key]

    return value, locate


def _storage_bytes(value: Any) -> dict[str, int]:
    """Element width of every storage that a tensor anywhere in the (possibly shared, nested) value uses."""
    widths: dict[str, int] = {}
    pending, seen = [value], set()
    while pending:
        entry = pending.pop()
        if isinstance(entry, StoredTensor):
            widths[entry.storage.key] = entry.storage.dtype.itemsize
        elif isinstance(entry, dict | list | tuple) and id(entry) not in seen:
            seen.add(id(entry))
            pending.extend(entry.values() if isinstance(entry, dict) else entry)
    return widths


def require(tensors: Mapping[str, TensorView], name: str) -> TensorView:
    """Returns a tensor by name, or raises `UserError` naming it."""
    if name not in tensors:
        raise UserError(f"tensor {name!r} is missing")
    return tensors[name]
