"""A folder with a good model, good data, and every file that a user could give by mistake."""

import json
import os
import pickle
import struct
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm
from vlm import loading
from vlm.data.image import ImageSettings
from vlm.encoders.bert import BertConfig
from vlm.encoders.vit import ViTConfig
from vlm.manifest import write_manifest
from vlm.models import get_family
from vlm.models.altclip.model import AltCLIPConfig
from vlm.models.altclip.processor import Processor
from vlm.tokenizers import load
from vlm.tokenizers.spm import train_sentencepiece
from vlm.tree import unflatten

CONFIG = AltCLIPConfig(
    vision=ViTConfig(16, 2, 2, 32, 16, 8), text=BertConfig(64, 16, 2, 2, 32, 20), project_dim=8, projection_dim=8
)


class Payload:
    """Unpickling this would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def _png(width, height, data=b""):
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(data))]
    parts = [
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in [*chunks, (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _pictures(folder):
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (16, 20, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    good = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("this is no picture")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(_png(60_000, 60_000))
    (folder / "page.svg").write_text("<svg/>")


def _texts(folder):
    lines = [json.dumps({"image": f"{i}.png", "label": i % 2, "text": f"a photo of cat {i}"}) for i in range(3)]
    files = {
        "data.jsonl": "\n".join(lines),
        "toy.jsonl": "".join(json.dumps({"text": str(1000 + i)}) + "\n" for i in range(40)),
        "garbled.jsonl": "{" * 50,
        "cut.jsonl": "\n".join(lines)[:-9],
        "nothing.jsonl": "",
        "names.txt": "cat\ndog\n",
        "one.txt": "cat\n",
        "nothing.txt": "",
        "templates.txt": "a photo of {c}\n",
        "holeless.txt": "a photo of cat\n",
        "two.json": json.dumps({"a": ["cat"], "b": ["dog"]}),
        "gap.json": json.dumps({"0": "cat", "2": "dog"}),
        "number.json": "3",
        "broken.json": '{"family": "toy"',
        "list.json": "[1]",
        "nan.json": '{"family": "toy", "train": {"steps": NaN}}',
        "deep.json": "[" * 100_000,
        "config.yaml": "family: toy",
        "raises.py": "def get_config():\n    return 1 / 0\n",
        "none.py": "def get_config():\n    pass\n",
        "nothing.py": "",
        "syntax.py": "def get_config(:\n",
        "plain.pt": "hello, world, this is not a checkpoint",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "latin1.txt").write_bytes("Katze\nHündin\n".encode("latin-1"))
    evaluations = {
        "animals": {"kind": "zero_shot", "data": {"kind": "jsonl", "path": f"{folder}/data.jsonl"},
                    "classnames": f"{folder}/names.txt", "templates": f"{folder}/templates.txt"},
        "pairs": {"kind": "retrieval", "data": {"kind": "jsonl", "path": f"{folder}/data.jsonl"}},
    }  # fmt: skip
    (folder / "eval.json").write_text(json.dumps({"family": "altclip", "eval": evaluations}))


def _safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def _foreign(folder):
    """Weight files that are not what they seem."""
    import torch

    torch.save({"a": torch.ones(2)}, folder / "other.pt")
    whole = (folder / "other.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(whole[:-60])
    (folder / "code.pkl").write_bytes(pickle.dumps(Payload(folder / "executed")))
    with zipfile.ZipFile(folder / "code.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(folder / "executed"), protocol=2))
        archive.writestr("archive/version", "3")
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    files = {
        "other.safetensors": _safetensors({"a": entry}, bytes(16)),
        "truncated.safetensors": _safetensors({"a": entry}, bytes(9)),
        "overlap.safetensors": _safetensors({"a": entry, "b": entry}, bytes(16)),
        "header.safetensors": struct.pack("<Q", 2**60) + b"{}",
        "dtype.safetensors": _safetensors({"a": entry | {"dtype": "F17"}}, bytes(16)),
        "garbled.safetensors": _safetensors(b"\xff" * 20),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _models(folder):
    """A good model folder, and copies of it with one thing wrong."""
    family, rng = get_family("altclip"), np.random.default_rng(0)
    shapes = loading.expected_params(family, CONFIG)
    params = {name: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()}
    spm = folder / "sentencepiece.bpe.model"
    train_sentencepiece([f"a photo of {word} number {i}" for i in range(40) for word in ("cat", "dog")], spm, 32)
    processor = Processor(load(spm), ImageSettings(size=16, crop=16), max_length=8)
    vlm.save(folder / "model", family.module(CONFIG), unflatten(params), processor)
    files = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}
    config = json.loads(files["config.json"])
    deeper = json.loads(files["config.json"])
    deeper["model"]["vision"]["num_layers"] = 3

    def variant(name, seal=False, without=(), **changes):
        (folder / name).mkdir()
        for file, content in (files | changes).items():
            if file not in without:
                (folder / name / file).write_bytes(content)
        if seal:
            write_manifest(folder / name, {})

    flipped = bytearray(files["params.safetensors"])
    flipped[-5] ^= 4
    variant("cut", **{"params.safetensors": files["params.safetensors"][:-7]})
    variant("flipped", **{"params.safetensors": bytes(flipped)})
    variant("bare", without=["vlm_manifest.json"])
    variant("weightless", without=["params.safetensors"])
    variant("version", True, **{"config.json": json.dumps(config | {"format_version": 9}).encode()})
    variant("family", True, **{"config.json": json.dumps(config | {"family": "altclop"}).encode()})
    variant("key", True, **{"config.json": json.dumps(config | {"model": {"visio": {}}}).encode()})
    variant("deeper", True, **{"config.json": json.dumps(deeper).encode()})
    variant("json", True, **{"config.json": b"{"})
    variant("tokenizer", True, **{"sentencepiece.bpe.model": b"no model"})
    for name in ("empty", "run/checkpoints"):
        (folder / name).mkdir(parents=True)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for make in (_pictures, _texts, _foreign, _models):
        make(folder)
    return folder
