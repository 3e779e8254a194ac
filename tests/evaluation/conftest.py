"""A model whose answers are known: it sees the mean colour of an image and the colour words of a text."""

import dataclasses
import io
import json

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


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory):
    """The demonstration's two-digit scenes, a few of them."""
    from vlm.demo import scenes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SCENES", {"train": 4, "test": 22})
        return scenes.prepare_scenes(tmp_path_factory.mktemp("scenes") / "scenes")


@pytest.fixture(scope="session")
def tiny_blip(scenes_folder):
    """By task, and with other settings of the model: a random BLIP (module, parameters, processor)."""
    from vlm.demo import scenes
    from vlm.encoders.vit import ViTConfig
    from vlm.fusion.med import MedConfig
    from vlm.models.blip.config import BLIPConfig
    from vlm.models.blip.model import BLIP
    from vlm.models.blip.processor import Processor, ProcessorConfig
    from vlm.sharding import unbox
    from vlm.strict import build
    from vlm.tree import flatten, unflatten

    words = len(scenes.vocabulary())
    vit = ViTConfig(8, 1, 2, 12, 24, 8, "gelu", patch_bias=True, input_norm=False, output_norm="all", init="normal")
    stack = MedConfig(words + 2, 8, 2, 2, 12, 24, 8)
    alone = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None}
    parts = {
        "caption": {**alone, "text": None, "decoder": stack},
        "vqa": {**alone, "text": stack, "decoder": stack},
        "retrieval": {"shared_decoder": False, "text": stack, "projection_dim": 6},
        "nlvr": {**alone, "text": stack, "num_labels": 2, "num_images": 2},
        "classification": {**alone, "text": stack, "itm": True},
    }
    ids = {"bos_id": words, "enc_id": words + 1, "cls_id": 2, "sep_id": 3}
    made = {}

    def make(task, **settings):
        name = task, *sorted(settings.items())
        if name not in made:
            model = BLIP(BLIPConfig(vision=vit, **parts[task], **ids, **settings))
            size = (1, 2, 24, 24, 3) if task == "nlvr" else (1, 24, 24, 3)
            batch = np.zeros(size, np.float32), np.zeros((1, 2), np.int32)
            shapes = jax.eval_shape(lambda key: model.init(key, *batch)["params"], jax.random.key(0))
            rng = np.random.default_rng(1)
            flat = flatten(unbox(shapes))
            params = unflatten({path: jnp.asarray(_random(path, x.shape, rng)) for path, x in flat.items()})
            image = {"size": 24, "crop": None, "mode": "exact"}
            config = {"task": task, "image": image, "max_length": 20, "tokenizer": str(scenes_folder / "tokenizer")}
            made[name] = model, params, Processor.from_config(build(ProcessorConfig, config, "processor"))
        return made[name]

    return make


def _random(path, shape, rng):
    """Large enough that every image gets its own answer."""
    noise = rng.normal(size=shape).astype(np.float32)
    return 1 + 0.3 * noise if path.endswith("scale") else np.abs(noise) + 0.1 if path == "temperature" else 0.8 * noise


@pytest.fixture
def mesh8():
    """Two by two by two of the eight host devices."""
    from jax.sharding import AxisType, Mesh

    grid = np.asarray(jax.devices()[:8]).reshape(2, 2, 2)
    return Mesh(grid, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
