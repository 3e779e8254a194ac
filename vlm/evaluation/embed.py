"""Unit embeddings of whole data sets, computed on all devices of all hosts and returned on every host.

Any batch is cut to equal rows per device; rows past the end and unreadable examples are computed like the others and
dropped afterwards by their `valid` flag, so that each example counts exactly once whatever the number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int
from PIL import Image

from vlm.data.batch import LoaderSettings
from vlm.data.image import decode
from vlm.data.ledger import FatalDataError
from vlm.data.loader import Loader
from vlm.data.source import Source
from vlm.errors import UserError
from vlm.sharding import local_rows, put_batch

TEXT_GROUP = 8192
LENGTH_STEP = 16

Note = dict[str, Any]
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Embedder:
    """A model of the contrastive protocol with what is needed to feed it.

    Attributes:
      model: a module with `encode_image(image)` and `encode_text(tokens, mask)`.
      params: its parameters, wherever they lie on `mesh`.
      processor: turns images and texts into batches.
      mesh: None computes on the default device.
      batch_axes: mesh axes that the rows of a batch are split over.
      batch_size: rows over all devices, rounded up to a multiple of them.
      num_workers: threads per host that decode images.
      memory: the image embeddings of the last data set, so that evaluations of one set in several languages run the
        image tower once; see `all_images`.
    """

    model: Any
    params: Any
    processor: Any
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    batch_size: int = 64
    num_workers: int = 2
    memory: dict[str, tuple[np.ndarray, list[int]]] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of a batch over all devices."""
        ways = math.prod(self.mesh.shape[axis] for axis in self.batch_axes) if self.mesh is not None else 1
        return -(-self.batch_size // ways) * ways

    def check(self, *, images: bool = True, texts: bool = True) -> None:
        """Traces the model on one blank image and one text, without running it.

        Raises:
          UserError: it has no such tower or projection, its parameters do not fit, or the processor lacks a part.
        """
        calls: list[tuple[str, Any]] = []
        if images:
            calls.append(("encode_image", self.processor(images=[Image.new("RGB", (32, 32))])))
        if texts:
            calls.append(("encode_text", self.processor(texts=["a"])))
        for method, batch in calls:
            names = ("image",) if method == "encode_image" else ("tokens", "mask")
            found = [np.asarray(batch[name]) for name in names]
            inputs = tuple(jax.ShapeDtypeStruct((self.rows, *array.shape[1:]), array.dtype) for array in found)
            row = jax.ShapeDtypeStruct((self.rows,), np.int32)
            try:
                jax.eval_shape(functools.partial(_apply, self.model, method, None), self.params, inputs, row, row)
            except (AttributeError, TypeError, ValueError, FlaxError) as error:
                what = " ".join(str(error).split())[:300]
                raise UserError(f"this model and processor cannot {method.replace('_', ' an ')}: {what}") from error

    def pictures(self, paths: Sequence[str | Path]) -> Float[np.ndarray, "n d"]:
        """Unit embeddings of picture files, in order; on one host.

        Raises:
          UserError: one of them cannot be read.
        """
        parts: list[np.ndarray] = []
        for start in range(0, len(paths), self.rows):
            batch = self.processor(images=[decode(path) for path in paths[start : start + self.rows]])
            count = len(batch["image"])
            padded = np.resize(np.arange(count), self.rows)
            image = np.asarray(batch["image"])[padded]
            embeds, _, _ = self._encode(
                "encode_image", [image], padded.astype(np.int32), np.ones(self.rows, bool), True
            )
            parts.append(embeds[:count])
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def images(
        self, source: Source, note: Callable[[dict[str, Any]], Note], advance: Advance | None = None
    ) -> Iterator[tuple[Float[np.ndarray, "n d"], list[Note]]]:
        """Yields the unit embeddings of the readable images in order, a batch at a time, with their notes.

        Args:
          note: what to keep of a raw example, as JSON can hold it. Its position is added as "index".
          advance: called with the number of examples done.

        Raises:
          UserError: an example that `note` refuses, or every image is unreadable.
        """
        start, stop = self._local_rows()
        settings = LoaderSettings(
            self.rows,
            num_workers=self.num_workers,
            host_index=start // (stop - start),
            host_count=self.rows // (stop - start),
            max_skip_fraction=1.0,
        )
        notes: dict[int, Note] = {}
        transform = functools.partial(self._image, note=note, notes=notes)
        loader = Loader([_Numbered(source)], transform, settings, train=False)
        readable = 0
        with loader.iterate() as batches:
            for step, batch in enumerate(batches):
                embeds, index, valid = self._encode("encode_image", [batch["image"]], batch["index"], batch["valid"])
                mine = {int(i): notes.pop(int(i)) for i in batch["index"][batch["valid"]]}
                everyone = _gather(mine)
                readable += int(valid.sum())
                yield embeds[valid], [{"index": int(i), **everyone[int(i)]} for i in index[valid]]
                if advance is not None:
                    advance(min((step + 1) * self.rows, len(source)))
        if not readable:
            raise UserError(f"{source.name}: no image could be read, the first: {loader.ledger.entries[0].error}")

    def all_images(
        self,
        source: Source,
        note: Callable[[dict[str, Any]], Note],
        advance: Advance | None = None,
        key: str | None = None,
    ) -> tuple[Float[np.ndarray, "n d"], list[Note]]:
        """What `images` yields, as one array and one list.

        Args:
          key: says which images these are; where it is the last call's, their embeddings are not computed again.
        """
        if key is not None and key in self.memory:
            embeds, indices = self.memory[key]
            notes = [{"index": index, **note(source[index])} for index in indices]
            if advance is not None:
                advance(len(source))
            return embeds, notes
        parts = list(self.images(source, note, advance))
        embeds, notes = np.concatenate([embeds for embeds, _ in parts]), [note for _, notes in parts for note in notes]
        if key is not None:
            self.memory.clear()
            self.memory[key] = embeds, [note["index"] for note in notes]
        return embeds, notes

    def texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Unit embeddings of texts, in order."""
        groups = [self._group(texts[start : start + TEXT_GROUP]) for start in range(0, len(texts), TEXT_GROUP)]
        return np.concatenate(groups)

    def _group(self, texts: Sequence[str]) -> np.ndarray:
        batch = self.processor(texts=list(texts))
        tokens, mask = np.asarray(batch["tokens"], np.int32), np.asarray(batch["mask"], bool)
        lengths = (mask * np.arange(1, mask.shape[1] + 1)).max(axis=1)
        order = np.argsort(lengths, kind="stable")  # rows of similar length share a batch
        result: np.ndarray | None = None
        for start in range(0, len(texts), self.rows):
            rows = order[start : start + self.rows]
            padded = np.resize(rows, self.rows)  # repeats rows up to the batch size
            columns = min(-(-max(1, lengths[rows].max()) // LENGTH_STEP) * LENGTH_STEP, tokens.shape[1])
            inputs = [tokens[padded, :columns], mask[padded, :columns]]
            embeds, _, _ = self._encode("encode_text", inputs, padded.astype(np.int32), np.ones(self.rows, bool), True)
            result = np.empty((len(texts), embeds.shape[1]), np.float32) if result is None else result
            result[rows] = embeds[: len(rows)]
        assert result is not None
        return result

    def _image(self, example: dict[str, Any], rng: np.random.Generator, train: bool, *, note: Any, notes: Any) -> Any:
        del rng, train
        index = example.pop("index")
        try:
            kept = note(example)
        except UserError as error:  # a wrong label is no unreadable picture: it must not be skipped
            raise FatalDataError(str(error)) from None
        data = example.get("image")
        if data is None:
            raise UserError(f"example {example.get('key')!r} has no image; it has {', '.join(sorted(example))}")
        batch = self.processor(images=[decode(data, name=f"image of {example.get('key')!r}")])
        notes[index] = kept
        return {"image": np.asarray(batch["image"][0])}

    def _encode(
        self, method: str, inputs: list[np.ndarray], index: np.ndarray, valid: np.ndarray, whole: bool = False
    ) -> tuple[np.ndarray, Int[np.ndarray, " n"], np.ndarray]:
        """Runs one batch. The inputs are this host's rows, or with `whole` the whole batch on every host."""
        names = [str(number) for number in range(len(inputs))]
        arrays = dict(zip(names, inputs, strict=True)) | {"index": index, "valid": valid}
        target = None
        if self.mesh is not None:
            if whole:
                start, stop = self._local_rows()
                arrays = {name: array[start:stop] for name, array in arrays.items()}
            arrays = put_batch(arrays, self._sharding(), self.rows)
            target = NamedSharding(self.mesh, PartitionSpec())
        tensors = tuple(arrays[name] for name in names)
        outputs = _apply(self.model, method, target, self.params, tensors, arrays["index"], arrays["valid"])
        embeds, index, valid = (np.asarray(output) for output in outputs)
        bad = int((~np.isfinite(embeds).all(axis=1)).sum())
        if bad:
            what = method.removeprefix("encode_")
            raise UserError(
                f"{bad} of {len(embeds)} {what} embeddings are not finite unit vectors: has training diverged?"
            )
        return embeds, index, valid

    def _sharding(self) -> NamedSharding:
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(self.batch_axes))

    def _local_rows(self) -> tuple[int, int]:
        return (0, self.rows) if self.mesh is None else local_rows(self._sharding(), self.rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(
    model: Any, method: str, target: Any, params: Any, inputs: Any, index: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unit embeddings, replicated on every device so that every host can read all of them."""
    embeds = jnp.asarray(model.apply({"params": params}, *inputs, method=method), jnp.float32)
    embeds /= jnp.linalg.norm(embeds, axis=-1, keepdims=True)
    outputs = (embeds, index, valid)
    return outputs if target is None else jax.lax.with_sharding_constraint(outputs, (target,) * 3)


class _Numbered:
    """A source whose examples know their position."""

    def __init__(self, source: Source):
        self._source, self.name, self.fingerprint = source, source.name, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "index": index}


def _gather(notes: dict[int, Note]) -> dict[int, Note]:
    """The notes of all hosts, on every host."""
    if jax.process_count() == 1:
        return notes
    from jax.experimental.multihost_utils import process_allgather

    data = np.frombuffer(json.dumps(list(notes.items()), ensure_ascii=False).encode(), np.uint8)
    lengths = np.asarray(process_allgather(np.int32(len(data)))).reshape(-1)
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(data)] = data
    everyone = np.asarray(process_allgather(padded)).reshape(len(lengths), -1)
    parts = (json.loads(bytes(row[:length])) for row, length in zip(everyone, lengths, strict=True))
    return {int(index): note for part in parts for index, note in part}
