"""The command on a real model folder: last line, files, status 2 with one line for every wrong input."""

import hashlib
import json
import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import vlm
from vlm import loading
from vlm.data.image import ImageSettings
from vlm.encoders.bert import BertConfig
from vlm.encoders.vit import ViTConfig
from vlm.models import get_family
from vlm.models.altclip.model import AltCLIPConfig
from vlm.models.altclip.processor import Processor
from vlm.tokenizers import load
from vlm.tokenizers.spm import train_sentencepiece
from vlm.tree import unflatten

ROOT = pathlib.Path(__file__).parents[1]
FAMILY = get_family("altclip")
CONFIG = AltCLIPConfig(
    vision=ViTConfig(16, 2, 2, 32, 16, 8), text=BertConfig(64, 16, 2, 2, 32, 20), project_dim=8, projection_dim=8
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    shapes = loading.expected_params(FAMILY, CONFIG)
    params = unflatten(
        {name: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32) for name, leaf in shapes.items()}
    )
    spm = folder / "sentencepiece.bpe.model"
    train_sentencepiece([f"a photo of {word} number {i}" for i in range(40) for word in ("cat", "dog")], spm, 32)
    processor = Processor(load(spm), ImageSettings(size=16, crop=16), max_length=8)
    vlm.save(folder / "saved", FAMILY.module(CONFIG), params, processor)
    return folder / "saved"


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (16, 20, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "label": i % 2, "text": f"a photo of cat number {i}"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    data = {"kind": "jsonl", "path": str(tmp_path / "data.jsonl")}
    small = {"batch_size": 8, "bootstrap": {"resamples": 50}}
    evaluations = {
        "animals": {
            "kind": "zero_shot",
            "data": data,
            "classnames": str(tmp_path / "names.txt"),
            "templates": ["a photo of {c}"],
        },
        "pairs": {"kind": "retrieval", "data": data} | small,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"family": "altclip", "eval": evaluations}))
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    main = runpy.run_path(str(ROOT / "eval.py"))["main"]

    def call(*arguments):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def test_results(run, checkpoint, config, tmp_path):
    output = tmp_path / "out" / "results.json"
    status, out, err = run(f"--config={config}", f"--checkpoint={checkpoint}", f"--output={output}")
    assert status == 0, err
    metrics = json.loads(out.splitlines()[-1])
    assert {"animals/top1", "pairs/mean_recall"} <= metrics.keys() and "pairs 7/7" in err
    found = json.loads(output.read_text())
    assert found["metrics"] == metrics and found["checkpoint"] == str(checkpoint)
    manifest = (checkpoint / "vlm_manifest.json").read_bytes()
    assert found["checkpoint_manifest_sha256"] == hashlib.sha256(manifest).hexdigest() and found["step"] is None
    assert len(found["config_sha256"]) == 64 and found["environment"]["versions"]["jax"] and found["code"]
    assert found["evaluations"]["animals"]["n"] == 7
    assert {path.name for path in output.parent.iterdir()} == {
        "results.json", "results.html", "results.animals.jsonl", "results.pairs.jsonl",
    }  # fmt: skip


def test_limit_only_and_overrides(run, checkpoint, config):
    status, out, _ = run(
        f"--config={config}", f"--checkpoint={checkpoint}", "--limit=4", "--only=pairs", "--config.eval.pairs.k=(1,2)"
    )
    metrics = json.loads(out.splitlines()[-1])
    assert status == 0 and {name.split("/")[0] for name in metrics} == {"pairs"}
    assert "pairs/text_to_image_recall@2" in metrics and "pairs/text_to_image_recall@10" not in metrics


def test_unreadable_checkpoint_leaves_no_output(run, config, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"format_version": 1}')
    output = tmp_path / "out" / "r.json"
    status, _, err = run(f"--config={config}", f"--checkpoint={tmp_path / 'model'}", f"--output={output}")
    assert status == 2 and err.count("\n") == 1 and not output.parent.exists()
