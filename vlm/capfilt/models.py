"""The two models of CapFilt as they work on batches of one fixed shape: a captioner and a filter."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from vlm.data.text import clean_caption
from vlm.errors import UserError
from vlm.family import NO_PROCESSOR
from vlm.fusion.med import MedConfig
from vlm.generation import GenerationConfig, generate, prepare
from vlm.models.blip.config import BLIPConfig
from vlm.tree import flatten

Loaded = tuple[Any, dict[str, Any], Any]
"""Model, parameters and processor, as `vlm.load` returns them."""


class Captioner:
    """Writes one caption per image.

    Args:
      loaded: a BLIP model with a decoder that reads images.
      config: how to draw; lengths count the prompt.
      prompt: what captions begin with; it is not part of them.
      rows: images of every batch.
      max_words: words that are kept of a cleaned caption.

    Raises:
      UserError: another model, no tokenizer or image settings, or a prompt that leaves no room.
    """

    def __init__(self, loaded: Loaded, config: GenerationConfig, prompt: str, rows: int, max_words: int):
        model, params, processor = loaded
        architecture = _check("--captioner", model, processor)
        if architecture.generative is None:
            raise UserError("--captioner: expected a model that writes captions, found one without a decoder")
        if architecture.text is not None and architecture.decoder is not None:
            raise UserError("--captioner: expected a model that writes captions, found one that answers questions")
        _check_words("--captioner", architecture.generative, processor.tokenizer)
        self.image_settings = processor.image_settings
        self._model, self._config, self._max_words = model, config, max_words
        self._decode = processor.tokenizer.decode
        self._prompt = processor(texts=[prompt] * rows, prompts=True, padding="longest")
        length, longest = int(self._prompt["mask"][0].sum()), config.max_length or 0
        if not length < longest <= model.context_length:
            raise UserError(
                f"--max_length: expected more than the prompt's {length} tokens and at most {model.context_length}, "
                f"found {longest}"
            )
        self._params = prepare(model, params)

    def __call__(self, image: Float[np.ndarray, "b h w 3"], keys: jax.Array) -> list[str]:
        """Cleaned captions; row i is drawn from key i alone."""
        batch = {"image": image, **self._prompt}
        found = generate(self._model, self._params, batch, config=self._config, rng=keys)
        return [clean_caption(self._decode(ids.tolist()), self._max_words) for ids in found.completions]


class Filter:
    """Says how probably a text belongs to an image: softmax of the matching head, index 1.

    Args:
      loaded: a BLIP model with a matching head.
      mesh, batch_axes: rows are split over these axes of the mesh.

    Raises:
      UserError: another model, or no tokenizer or image settings.
    """

    def __init__(self, loaded: Loaded, mesh: Mesh, batch_axes: tuple[str, ...]):
        model, self._params, self._processor = loaded
        architecture, longest = _check("--filter", model, self._processor), self._processor.max_length
        if architecture.text is None or not architecture.itm:
            raise UserError("--filter: expected a model with a matching head (retrieval, pretraining), found none")
        _check_words("--filter", architecture.text, self._processor.tokenizer)
        if longest > architecture.text.max_length:
            raise UserError(f"--filter: reads {architecture.text.max_length} tokens, its processor makes {longest}")
        self.image_settings = self._processor.image_settings
        self._model = model
        self._sharding = NamedSharding(mesh, PartitionSpec(batch_axes))

    def encode(self, image: Float[np.ndarray, "b h w 3"]) -> Float[Array, "b m c"]:
        """Image tokens, which stay on the devices."""
        return _encode(self._model, self._params, self._put(image=image)["image"])

    def __call__(self, texts: Sequence[str], states: Float[Array, "b m c"]) -> Float[np.ndarray, " b"]:
        """Matching probabilities of text i and image i.

        Raises:
          UserError: they are not numbers.
        """
        tokenizer, length = self._processor.tokenizer, self._processor.max_length
        rows = tokenizer(texts, max_length=length, padding="max_length")
        batch = self._put(tokens=rows["tokens"], mask=rows["mask"])
        found = np.asarray(_match(self._model, self._params, batch["tokens"], batch["mask"], states))
        if not np.isfinite(found).all():
            raise UserError("--filter: matching probabilities are not finite: has its training diverged?")
        return found

    def _put(self, **arrays: np.ndarray) -> dict[str, jax.Array]:
        return jax.device_put(arrays, self._sharding)


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Any, params: Any, image: jax.Array) -> jax.Array:
    return model.apply({"params": params}, image, method="encode_image_states").last_hidden_state


@functools.partial(jax.jit, static_argnums=0)
def _match(model: Any, params: Any, tokens: jax.Array, mask: jax.Array, states: jax.Array) -> jax.Array:
    logits = model.apply({"params": params}, tokens, mask, states, method="match")
    return jax.nn.softmax(logits.astype(jnp.float32))[:, 1]


def _check(flag: str, model: Any, processor: Any) -> BLIPConfig:
    config = model.config
    if not isinstance(config, BLIPConfig):
        raise UserError(f"{flag}: expected a BLIP model, found {type(model).__name__}")
    if config.num_images != 1 or config.video != "none":
        raise UserError(f"{flag}: expected a model of single images, found one of pairs or videos")
    if processor is None or processor.tokenizer is None:
        raise UserError(f"{flag}: the checkpoint {NO_PROCESSOR}")
    if config.vision is None:
        raise UserError(f"{flag}: the model has no image encoder")
    size, made = config.vision.image_size, processor.image_settings.output_size
    if made != (size, size):
        raise UserError(f"{flag}: the model sees images of {size} x {size}, its image settings make {made}")
    return config


def _check_words(flag: str, stack: MedConfig, tokenizer: Any) -> None:
    if tokenizer.vocab_size > stack.vocab_size:
        raise UserError(f"{flag}: the model knows {stack.vocab_size} tokens, its tokenizer {tokenizer.vocab_size}")


def keys(seed: int, shard: str, samples: np.ndarray) -> jax.Array:
    """One key per sample, from the seed, the shard's name and the sample's number in it: nothing else matters."""
    words = np.frombuffer(hashlib.blake2b(shard.encode(), digest_size=8).digest(), ">u4").astype(np.uint32)
    return _keys(jax.random.key(seed), words, np.asarray(samples, np.uint32))


@jax.jit
def _keys(key: jax.Array, words: jax.Array, samples: jax.Array) -> jax.Array:
    for word in words:
        key = jax.random.fold_in(key, word)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, samples)


def fingerprint(loaded: Loaded) -> str:
    """SHA-256 of parameters, architecture and what the processor does to images and texts."""
    model, params, processor = loaded
    settings = getattr(processor, "image_settings", None), getattr(processor, "max_length", None)
    tokenizer = getattr(processor, "tokenizer", None)
    about = (dataclasses.asdict(model.config), settings, tokenizer and tokenizer.vocab_size)
    digest = hashlib.sha256(repr(about).encode())
    for path, leaf in sorted(flatten(params).items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
