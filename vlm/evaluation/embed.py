"""Unit embeddings of whole data sets, computed on all devices of all hosts and returned on every host.

Any batch is cut to equal rows per device; rows past the end and unreadable examples are computed like the others and
dropped afterwards by their `valid` flag, so that each example counts exactly once whatever the number of devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from vlm.data.image import decode
from vlm.data.source import Source
from vlm.errors import UserError
from vlm.evaluation.feed import Advance, Feed, Note, blank_images, pictures_of, trace

TEXT_GROUP = 8192
LENGTH_STEP = 16

Features = Literal["embedding", "class_token"]
"""What of an image: its unit vector in the joint space, or the last state of the image encoder's class token."""


_METHODS: dict[str, str] = {"embedding": "encode_image", "class_token": "encode_image_states"}


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
      poll, max_skip_fraction: see `Feed`.
    """

    model: Any
    params: Any
    processor: Any
    mesh: Mesh | None = None
    batch_axes: tuple[str, ...] = ("data", "fsdp")
    batch_size: int = 64
    num_workers: int = 2
    memory: dict[str, tuple[np.ndarray, list[int]]] = dataclasses.field(default_factory=dict)
    poll: Callable[[], None] = lambda: None
    max_skip_fraction: float = 1.0

    @property
    def feed(self) -> Feed:
        """Where batches go."""
        names = ("mesh", "batch_axes", "batch_size", "num_workers", "poll", "max_skip_fraction")
        return Feed(**{name: getattr(self, name) for name in names})

    @property
    def rows(self) -> int:
        """Rows of a batch over all devices."""
        return self.feed.rows

    def check(self, *, images: bool = True, texts: bool = True, features: Features = "embedding") -> None:
        """Traces the model on one blank image, for `features`, and one text, without running it.

        Raises:
          UserError: it has no such tower or projection, its parameters do not fit, or the processor lacks a part.
        """
        calls: list[tuple[str, Any]] = []
        if images:
            calls.append((_METHODS[features], self.processor(images=blank_images())))
        if texts:
            calls.append(("encode_text", self.processor(texts=["a"])))
        for method, batch in calls:
            names = ("tokens", "mask") if method == "encode_text" else ("image",)
            found = [np.asarray(batch[name]) for name in names]
            inputs = tuple(jax.ShapeDtypeStruct((self.rows, *array.shape[1:]), array.dtype) for array in found)
            apply = functools.partial(_apply, self.model, method, None)
            shape = trace(method.replace("_", " an ", 1).replace("_", " "), apply, self.params, inputs).shape
            if len(shape) != 2:
                raise UserError(f"{method}: expected one vector per example, found an array of shape {shape}")

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
            parts.append(self._encode("encode_image", [image], whole=True)[:count])
        return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)

    def images(
        self,
        source: Source,
        note: Callable[[dict[str, Any]], Note],
        advance: Advance | None = None,
        features: Features = "embedding",
    ) -> Iterator[tuple[Float[np.ndarray, "n d"], list[Note]]]:
        """Yields the features of the readable images in order, a batch at a time, with their notes.

        Args:
          note: what to keep of a raw example, as JSON can hold it. Its position is added as "index".
          advance: called with the number of examples done.

        Raises:
          UserError: an example that `note` refuses, or more unreadable ones than `max_skip_fraction` allows.
        """
        for fed in self.feed.examples(source, self._image, note, advance):
            yield self._encode(_METHODS[features], [fed.local["image"]], valid=fed.valid), fed.notes

    def all_images(
        self,
        source: Source,
        note: Callable[[dict[str, Any]], Note],
        advance: Advance | None = None,
        key: str | None = None,
        features: Features = "embedding",
    ) -> tuple[Float[np.ndarray, "n d"], list[Note]]:
        """What `images` yields, as one array and one list.

        Args:
          key: says which images these are; where it is the last call's, their features are not computed again.
        """
        key = None if key is None else f"{features}:{key}"
        if key is not None and key in self.memory:
            embeds, indices = self.memory[key]
            notes = [{"index": index, **note(source[index])} for index in indices]
            if advance is not None:
                advance(len(source))
            return embeds, notes
        parts = list(self.images(source, note, advance, features))
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
            embeds = self._encode("encode_text", inputs, whole=True)
            result = np.empty((len(texts), embeds.shape[1]), np.float32) if result is None else result
            result[rows] = embeds[: len(rows)]
        assert result is not None
        return result

    def _image(self, example: dict[str, Any]) -> dict[str, np.ndarray]:
        return {"image": np.asarray(self.processor(images=[pictures_of(example)])["image"][0])}

    def _encode(
        self, method: str, inputs: list[np.ndarray], *, whole: bool = False, valid: np.ndarray | None = None
    ) -> np.ndarray:
        """Runs one batch; of the whole of it the rows `valid`.

        The inputs are this host's rows, or with `whole` the whole batch on every host.
        """
        feed, arrays = self.feed, {str(number): array for number, array in enumerate(inputs)}
        placed = feed.put_whole(arrays) if whole else feed.put(arrays)
        embeds = np.asarray(_apply(self.model, method, feed.replicated, self.params, tuple(placed.values())))
        embeds = embeds if valid is None else embeds[valid]
        bad = int((~np.isfinite(embeds).all(axis=1)).sum())
        if bad:
            what = {"encode_image": "image embeddings", "encode_text": "text embeddings"}.get(method, "image states")
            finite = "finite" if method == _METHODS["class_token"] else "finite unit vectors"
            raise UserError(f"{bad} of {len(embeds)} {what} are not {finite}: has training diverged?")
        return embeds


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _apply(model: Any, method: str, target: Any, params: Any, inputs: Any) -> jax.Array:
    """Unit embeddings, or class tokens, replicated on every device so that every host can read all of them."""
    found = model.apply({"params": params}, *inputs, method=method)
    if method == _METHODS["class_token"]:
        embeds = jnp.asarray(found.last_hidden_state[:, 0], jnp.float32)
    else:
        embeds = jnp.asarray(found, jnp.float32)
        embeds /= jnp.linalg.norm(embeds, axis=-1, keepdims=True)
    return embeds if target is None else jax.lax.with_sharding_constraint(embeds, target)
