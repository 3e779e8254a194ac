"""What a frozen model says, computed once and kept on disk: teacher embeddings (AltCLIP), visual words (FLAVA).

A cache is a folder: `embeddings-00000.npy`, ... (rows of float16, bfloat16 kept as its bits, float32, or uint16 for
visual words), `keys.npy` (128-bit hashes of the sentences or of the encoded pictures, sorted), `rows.npy` (row of each
key) and `manifest.json`, written last. Embeddings are found by the English sentence, so that one cache serves every
language of a parallel corpus.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num

from vlm.convert.writer import new_folder
from vlm.data.ledger import FatalDataError
from vlm.data.text import one_text
from vlm.errors import UserError, did_you_mean

_DTYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "uint16": np.uint16}
_FORMAT = 1
Batches = Iterable[tuple[Sequence[str] | Sequence[bytes], Num[np.ndarray, "b dim"]]]


def _terms(dtype: str) -> tuple[str, str, str]:
    """What errors call a cache, its items, and a row."""
    return ("visual words", "pictures", "row") if dtype == "uint16" else ("teacher cache", "sentences", "embedding")


def normalise(sentence: str) -> str:
    """Returns what is hashed: Unicode NFC, runs of white space as one space, none at the ends. Case counts."""
    return " ".join(unicodedata.normalize("NFC", sentence).split())


def sentence_key(sentence: str) -> bytes:
    """Returns the 16-byte BLAKE2b hash of the normalised sentence."""
    return hashlib.blake2b(normalise(sentence).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def image_key(image: bytes) -> bytes:
    """Returns the 16-byte BLAKE2b hash of an encoded picture."""
    return hashlib.blake2b(image, digest_size=16).digest()


class Key(bytes):
    """What `sentence_key` or `image_key` returned, in the place of the sentence or picture."""


def picture_key(image: bytes) -> Key:
    """Returns `image_key` in a form that a cache takes for the picture itself."""
    return Key(image_key(image))


def item_key(item: str | bytes) -> bytes:
    """Returns the key of a sentence or of an encoded picture, or the key that stands in its place."""
    if isinstance(item, Key):
        return bytes(item)
    return image_key(item) if isinstance(item, bytes) else sentence_key(item)


def _shown(item: str | bytes) -> str:
    if isinstance(item, Key):
        return f"picture of key {item.hex()}"
    return f"picture of {len(item):,} bytes" if isinstance(item, bytes) else f"{normalise(item)!r:.200}"


def write_cache(
    path: str | os.PathLike,
    batches: Batches,
    *,
    teacher: str,
    dtype: str = "float16",
    vocab_size: int | None = None,
    rows_per_shard: int = 1 << 18,
) -> int:
    """Writes a cache; returns how many distinct items it holds. An item met again keeps its first row.

    Args:
        path: the folder to make; it appears only when complete.
        batches: items (sentences, encoded pictures, or their `Key`s) and their rows.
        teacher: fingerprint of the model that made them, compared when the cache is opened.
        dtype: float16, bfloat16, float32, or uint16 for whole numbers.
        vocab_size: of visual words; every number of a row is below it.
        rows_per_shard: rows of one file.

    Raises:
        UserError: the folder is there already or cannot be made, an unknown dtype, shapes that do not fit, values that
            are not finite (in `dtype`) or not below `vocab_size`, or no item at all.
    """
    if dtype not in _DTYPES:
        raise UserError(f"cache dtype {dtype!r}{did_you_mean(dtype, _DTYPES)}")
    with new_folder(pathlib.Path(path)) as draft:
        writer = _Writer(draft, dtype, rows_per_shard, vocab_size)
        for sentences, embeddings in batches:
            writer.add(sentences, np.asarray(embeddings))
        return writer.finish(teacher)


def stored_rows(
    items: Sequence[str] | Sequence[bytes], rows: Num[np.ndarray, "b dim"], dtype: str, vocab_size: int | None = None
) -> Num[np.ndarray, "b dim"]:
    """Returns the rows of some items as they are stored.

    Raises:
        UserError: see `write_cache`.
    """
    cache, kind, row = _terms(dtype)
    if rows.ndim != 2 or len(rows) != len(items):
        raise UserError(f"{cache}: {len(items)} {kind} but {row}s {list(rows.shape)}")
    if vocab_size is not None and rows.size and rows.max() >= vocab_size:
        raise UserError(f"visual words: expected numbers below {vocab_size}, found {rows.max()}")
    stored = encode(rows, dtype)
    finite = np.isfinite(decode(stored, dtype)).all(axis=1)
    if not finite.all():
        item = items[int(np.flatnonzero(~finite)[0])]
        raise UserError(f"{cache}: {row} of {_shown(item)} is not finite in {dtype}")
    return stored


class _Writer:
    def __init__(self, folder: pathlib.Path, dtype: str, rows_per_shard: int, vocab_size: int | None):
        self._folder, self._dtype, self._limit, self._vocab_size = folder, dtype, rows_per_shard, vocab_size
        self._known: dict[bytes, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._pending: list[np.ndarray] = []
        self._dim: int | None = None

    def add(self, sentences: Sequence[str] | Sequence[bytes], embeddings: np.ndarray) -> None:
        stored = stored_rows(sentences, embeddings, self._dtype, self._vocab_size)
        self._dim = embeddings.shape[1] if self._dim is None else self._dim
        if embeddings.shape[1] != self._dim:
            cache, _, row = _terms(self._dtype)
            raise UserError(f"{cache}: {row}s of {embeddings.shape[1]} numbers after {self._dim}")
        for sentence, row in zip(sentences, stored, strict=True):
            key = item_key(sentence)
            if key not in self._known:
                self._known[key] = len(self._known)
                self._pending.append(row.copy())
                if len(self._pending) == self._limit:
                    self._flush()

    def _flush(self) -> None:
        name = f"embeddings-{len(self._shards):05d}.npy"
        rows = np.stack(self._pending)
        self._shards.append({"file": name, "rows": len(rows), **_save(self._folder / name, rows)})
        self._pending = []

    def finish(self, teacher: str) -> int:
        if not self._known:
            raise UserError("{}: no {}".format(*_terms(self._dtype)))
        if self._pending:
            self._flush()
        keys = np.frombuffer(b"".join(self._known), ">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        files = {name: _save(self._folder / f"{name}.npy", array) for name, array in
                 (("keys", keys[order]), ("rows", order.astype(np.int64)))}  # fmt: skip
        manifest = {"format_version": _FORMAT, "dtype": self._dtype, "dim": self._dim, "count": len(keys)}
        manifest |= {"teacher": teacher, "vocab_size": self._vocab_size, "shards": self._shards, "index": files}
        with open(self._folder / "manifest.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        return len(keys)


def _save(path: pathlib.Path, array: np.ndarray) -> dict[str, Any]:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Casts to the stored form; bfloat16 becomes its bits as uint16, rounded to nearest even.

    Raises:
        UserError: a number that uint16 does not hold.
    """
    if dtype == "uint16" and not np.array_equal(values, values.astype(np.uint16)):
        raise UserError("visual words: expected whole numbers from 0 to 65535")
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(_DTYPES[dtype])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)  # the carry would turn some NaNs into numbers


def decode(stored: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the values of the stored form: float32, of uint16 int32."""
    if dtype != "bfloat16":
        return stored.astype(np.int32 if dtype == "uint16" else np.float32)
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


@dataclasses.dataclass(frozen=True)
class _Manifest:
    format_version: int
    dtype: str
    dim: int
    count: int
    teacher: str
    shards: list
    index: dict
    vocab_size: int | None = None


class TeacherCache:
    """Rows by sentence or by encoded picture, memory-mapped; safe to read from many threads.

    Args:
        path: folder written by `write_cache`.
        teacher: fingerprint that the cache must have, or None for any.
        verify: also compare the SHA-256 of every file (reads all of it).

    Attributes:
        dim: numbers in one row.
        teacher: fingerprint of the model that made them.
        vocab_size: of visual words, where known.

    Raises:
        UserError: no cache there, another teacher's, or a file missing, cut short or (with `verify`) changed.
    """

    def __init__(self, path: str | os.PathLike, *, teacher: str | None = None, verify: bool = False):
        self.path = pathlib.Path(path)
        try:
            with open(self.path / "manifest.json", encoding="utf-8") as file:
                manifest = _Manifest(**json.load(file))
            entries = [*manifest.shards, *({"file": f"{n}.npy", **manifest.index[n]} for n in ("keys", "rows"))]
            sizes = [(str(entry["file"]), int(entry["bytes"]), str(entry["sha256"])) for entry in entries]
            ends = np.cumsum([int(shard["rows"]) for shard in manifest.shards])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path}: no cache of embeddings or visual words ({error})") from None
        if manifest.format_version != _FORMAT or manifest.dtype not in _DTYPES or [*ends[-1:]] != [manifest.count]:
            raise UserError(f"{self.path}: no cache of embeddings or visual words of format {_FORMAT}")
        if teacher is not None and teacher != manifest.teacher:
            raise UserError(f"{self.path}: made by teacher {manifest.teacher}, expected {teacher}")
        self.vocab_size = manifest.vocab_size
        self.dim, self.teacher, self._dtype, self._ends = manifest.dim, manifest.teacher, manifest.dtype, ends
        for name, size, digest in sizes:
            self._check(name, size, digest if verify else None)
        self._load([name for name, *_ in sizes])

    def _check(self, name: str, size: int, digest: str | None) -> None:
        path = self.path / os.path.basename(name)
        if not path.is_file():
            raise UserError(f"missing shard: {path}")
        if path.stat().st_size != size:
            raise UserError(f"{path}: truncated shard: expected {size:,} bytes, found {path.stat().st_size:,}")
        if digest is not None and _sha256(path) != digest:
            raise UserError(f"{path}: content does not match its SHA-256 in manifest.json")

    def _load(self, names: Sequence[str]) -> None:
        self._names = list(names)
        try:
            arrays = [np.load(self.path / os.path.basename(n), mmap_mode="r", allow_pickle=False) for n in names]
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"{self.path}: damaged shard ({error})") from None
        *self._shards, self._keys, self._rows = arrays
        for name, shard, rows in zip(names, self._shards, np.diff(self._ends, prepend=0), strict=False):
            if shard.shape != (rows, self.dim) or shard.dtype != _DTYPES[self._dtype]:
                raise UserError(
                    f"{self.path / name}: expected {self._dtype}[{rows}, {self.dim}], "
                    f"found {shard.dtype}{list(shard.shape)}"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_shards", "_keys", "_rows")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load(self._names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: str | bytes) -> Num[np.ndarray, " dim"]:
        """Returns the row in float32, of whole numbers in int32.

        Raises:
            FatalDataError: the cache has no such item (a `UserError` that the loader does not skip over).
        """
        high, low = np.frombuffer(item_key(item), ">u8").astype(np.uint64)
        place = int(np.searchsorted(self._keys[:, 0], high))
        while place < len(self) and self._keys[place, 0] == high:
            if self._keys[place, 1] == low:
                row = int(self._rows[place])
                shard = int(np.searchsorted(self._ends, row, side="right"))
                first = int(self._ends[shard - 1]) if shard else 0
                return decode(self._shards[shard][row - first], self._dtype)
            place += 1
        cache, _, row = _terms(self._dtype)
        raise FatalDataError(f"{cache} {self.path}: no {row} of {_shown(item)}")

    def lookup(self, sentences: Sequence[str] | Sequence[bytes]) -> Num[np.ndarray, "b dim"]:
        """Returns the rows of several sentences or pictures; raises UserError naming the first that is missing."""
        return np.stack([self[sentence] for sentence in sentences])


def english(example: Mapping[str, Any], field: str = "source_text") -> str:
    """Returns the sentence of an example that the teacher reads.

    Raises:
        UserError: it has none, or one that no tokenizer takes, with half a surrogate pair; training replaces it.
    """
    text = example.get(field)
    if not isinstance(text, str):
        raise UserError(f"expected a `{field}` string, found {text!r:.80}")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"`{field}` is not valid Unicode: {text!r:.80}")
    return text


@dataclasses.dataclass(frozen=True)
class WithTarget:
    """A transform that adds `target` float32[dim], the teacher's embedding of the example's English sentence.

    Attributes:
        transform: the transform to extend (see `loader.Loader`).
        cache: where the embeddings are.
        field: field of the raw example that holds the English sentence.
    """

    transform: Callable[..., dict[str, np.ndarray]]
    cache: TeacherCache
    field: str = "source_text"

    @property
    def fingerprint(self) -> str:
        """Of the teacher: another one's embeddings are other data."""
        return self.cache.teacher

    def __call__(self, example: dict[str, Any], rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Applies the transform and joins the embedding.

        Of several English sentences it draws one where the transform draws for a live teacher: last, from `rng`.
        """
        row = self.transform(example, rng, train)
        text = one_text(example.get(self.field), rng if train else None, f"`{self.field}`")
        return {**row, "target": self.cache[english({self.field: text}, self.field)]}


@dataclasses.dataclass(frozen=True)
class WithPatchLabels:
    """A transform that adds `patch_labels` int32[P], the visual words of the example's picture, where it has one.

    Attributes:
        transform: the transform to extend (see `loader.Loader`); it must not crop at random.
        cache: where the labels are.
    """

    transform: Callable[..., dict[str, np.ndarray]]
    cache: TeacherCache

    @property
    def fingerprint(self) -> str:
        """Of the codebook: another one's words are other data."""
        return self.cache.teacher

    def __call__(self, example: dict[str, Any], rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Applies the transform and joins the labels."""
        row, image = self.transform(example, rng, train), example.get("image")
        return row if image is None else {**row, "patch_labels": self.cache[bytes(image)]}
