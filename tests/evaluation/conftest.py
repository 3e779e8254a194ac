"""A model whose answers are known: it sees the mean colour of an image and the colour words of a text."""

import dataclasses
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0), "white": (255,) * 3}
WORDS = ["<pad>", *COLOURS, "dark", "photo", "rot", "红"]


@dataclasses.dataclass(frozen=True)
class ColourModel:
    """`apply` as a Linen module has it; hashable, so that it can be a static argument."""

    def encode_image(self, image):
        raise NotImplementedError

    def apply(self, variables, *inputs, method):
        params = variables["params"]
        if method == "encode_image_states":
            return types.SimpleNamespace(last_hidden_state=jnp.mean(inputs[0], axis=(1, 2))[:, None])
        if method == "encode_image":
            return jnp.mean(inputs[0], axis=(1, 2)) @ params["projection"]
        tokens, mask = inputs
        return jnp.sum(params["words"][tokens] * mask[..., None], axis=1) @ params["projection"]


class ColourProcessor:
    """Two-pixel images, one token per known word."""

    def __call__(self, images=None, texts=None):
        batch = {}
        if images is not None:
            rows = [np.asarray(image.resize((2, 2)), np.float32) / 255 for image in images]
            batch["image"] = np.stack(rows)
        if texts is not None:
            ids = [[WORDS.index(word) for word in text.split() if word in WORDS] for text in texts]
            length = 24
            batch["tokens"] = np.array([row + [0] * (length - len(row)) for row in ids], np.int32)
            batch["mask"] = np.array([[True] * len(row) + [False] * (length - len(row)) for row in ids])
        return batch


@pytest.fixture
def model():
    return ColourModel()


@pytest.fixture
def processor():
    return ColourProcessor()


@pytest.fixture
def params():
    words = np.zeros((len(WORDS), 3), np.float32)
    words[1 : 1 + len(COLOURS)] = np.array(list(COLOURS.values())) / 255
    words[WORDS.index("dark")] = (-0.3, -0.1, -0.2)
    words[WORDS.index("photo")] = (0.1, 0.2, 0.1)
    words[WORDS.index("rot")], words[WORDS.index("红")] = words[1], words[1]
    projection = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    return jax.tree.map(jnp.asarray, {"words": words, "projection": projection})


def png(colour, size=(3, 3), noise=0, seed=0):
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.integers(-noise, noise + 1, (*size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def colours(tmp_path):
    """Makes a data set of noisy colour patches; returns its source spec and the images."""

    def make(count=23, noise=120, broken=(), name="data", **fields):
        folder = tmp_path / name
        folder.mkdir()
        lines, rows = [], []
        for i in range(count):
            label = i % len(COLOURS)
            word, colour = list(COLOURS.items())[label]
            data = png(colour, noise=noise, seed=i)
            (folder / f"{i}.png").write_bytes(data[: len(data) // 2] if i in broken else data)
            row = {"key": f"k{i}", "image": f"{i}.png", "label": label, "word": word, "text": [word, f"dark {word}"]}
            lines.append(json.dumps(row | {key: value(i) for key, value in fields.items()}))
            rows.append((np.asarray(Image.open(io.BytesIO(data)).resize((2, 2)), np.float32) / 255, label))
        (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
        return {"kind": "jsonl", "path": str(folder / "data.jsonl")}, rows

    return make
