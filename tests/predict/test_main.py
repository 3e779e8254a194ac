"""Prediction on a fake model with known answers, and everything a user can get wrong."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from vlm import predict
from vlm.evaluation import embed

LABELS = {"red": 0, "rojo": 0, "红": 0, "أخضر": 1, "green": 1, "blue": 2}


class Model:
    """Sees the mean colour of an image, and of a text the colour it names."""

    def apply(self, variables, *inputs, method):
        return inputs[0].mean((1, 2)) if method == "encode_image" else variables["params"]["words"][inputs[0][:, 0]]

    def __hash__(self):
        return 1

    def __eq__(self, other):
        return isinstance(other, Model)


def processor(images=None, texts=None):
    if images is not None:
        return {"image": np.stack([np.asarray(image.resize((2, 2)), np.float32) / 255 for image in images])}
    found = [next((LABELS[word] for word in LABELS if word in text), 2) for text in texts]
    return {"tokens": np.array(found, np.int32)[:, None], "mask": np.ones((len(texts), 1), bool)}


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    (tmp_path / "model").mkdir()
    params = {"words": np.eye(3, dtype=np.float32), "logit_scale": np.float32(np.log(10))}
    monkeypatch.setattr("vlm.loading.load", lambda path, dtype=None: (Model(), params, processor))
    monkeypatch.setattr(embed, "TEXT_GROUP", 4)

    def call(*arguments):
        try:
            status = predict.main([str(tmp_path / "model"), *map(str, arguments)])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, colour in (("a_red", (250, 20, 0)), ("b_green", (10, 240, 0)), ("c_blue", (0, 0, 255))):
        Image.new("RGB", (8, 5), colour).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def answer(out):
    return json.loads(out.splitlines()[-1])


def test_classify(run, images):
    status, out, _ = run("--task=classify", f"--image={images}", "--text=红", "--text=أخضر", "--text=blue", "--top=2")
    assert status == 0
    results = answer(out)["results"]
    assert [result["prediction"] for result in results] == ["红", "أخضر", "blue"]
    assert "红" in out.splitlines()[1] and len(results[0]["labels"]) == 2
    cosine = np.array([250, 20, 0]) / np.hypot(250, 20)
    expected = np.exp(10 * cosine[0]) / np.exp(10 * cosine).sum()
    assert results[0]["labels"][0]["probability"] == pytest.approx(expected, abs=1e-5)


def test_classify_with_files_and_templates(run, images, tmp_path):
    (tmp_path / "labels.txt").write_text("\ufeffrojo\n\n green \n", encoding="utf-8")
    arguments = ["--template=una foto de {c}", "--template={c}", f"--output={tmp_path / 'o.json'}"]
    picture = images / "a_red.png"
    status, out, _ = run("--task=classify", f"--image={picture}", f"--text=@{tmp_path / 'labels.txt'}", *arguments)
    assert status == 0 and answer(out)["results"][0]["prediction"] == "rojo"
    assert json.loads((tmp_path / "o.json").read_text()) == answer(out)


def test_a_picture_whose_name_is_not_utf8(run, images, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    shutil.copy(images / "a_red.png", name)
    output = tmp_path / "o.json"
    status, out, _ = run("--task=classify", f"--image={name}", "--text=红", "--text=blue", f"--output={output}")
    assert status == 0 and answer(out)["results"][0]["image"] == name
    assert json.loads(output.read_text(encoding="utf-8")) == answer(out) and "红" in out


def test_retrieve_both_ways(run, images):
    status, out, _ = run(
        "--task=retrieve", f"--image={images}", "--text=the green one", "--text=red", "--batch_size=2", "--top=1"
    )
    found = answer(out)
    assert status == 0
    best = [row["images"][0]["image"].split("/")[-1] for row in found["text_to_image"]]
    assert best == ["b_green.png", "a_red.png"]
    assert [row["texts"][0]["text"] for row in found["image_to_text"]][:2] == ["red", "the green one"]


def test_embed(run, images, tmp_path):
    status, out, _ = run("--task=embed", f"--image={images}", "--text=blue")
    rows = answer(out)["rows"]
    assert status == 0 and len(rows) == 4 and rows[3] == {"text": "blue", "embedding": [0.0, 0.0, 1.0]}
    np.testing.assert_allclose(np.linalg.norm([row["embedding"] for row in rows], axis=1), 1, atol=1e-5)
    status, out, _ = run("--task=embed", f"--image={images}", "--text=blue", f"--output={tmp_path / 'e.npy'}")
    np.testing.assert_allclose(np.load(tmp_path / "e.npy"), [row["embedding"] for row in rows], atol=1e-5)
    assert "embedding" not in answer(out)["rows"][0]
    status, out, _ = run("--task=embed", "--text=red")
    assert status == 0 and answer(out)["width"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--task"),
        (["--task=paint"], "invalid choice"),
        (["--task=caption", "--image={images}"], "does not generate text"),
        (["--task=classify", "--text=a", "--text=b"], "needs --image and --text"),
        (["--task=classify", "--image={images}", "--text=a"], "at least two labels"),
        (["--task=classify", "--image={images}", "--text=a", "--text="], "empty"),
        (["--task=classify", "--image={images}", "--text=a", "--text=b", "--template=x"], "no {c}"),
        (["--task=embed"], "needs --image or --text"),
        (["--task=embed", "--image=/no.png"], "/no.png"),
        (["--task=embed", "--image={tmp}/model"], "no picture in"),
        (["--task=embed", "--image={images}/notes.txt"], "not a picture"),
        (["--task=embed", "--text=@/no.txt"], "/no.txt"),
        (["--task=embed", "--text=@{images}/a_red.png"], "not UTF-8"),
        (["--task=embed", "--text=a", "--output={tmp}/x.json"], "ends in .npy"),
        (["--task=embed", "--text=a", "--output={tmp}/no/x.npy"], "cannot write"),
        (["--task=retrieve", "--image={images}", "--text=a", "--top=0"], "at least 1"),
        (["--task=retrieve", "--image={images}", "--text=a", "--template={{c}}"], "--template belongs"),
        (["--task=embed", "--text=a", "--top=3"], "--top belongs to --task=classify and retrieve"),
        (["--task=caption", "--image={images}", "--top=5"], "--top belongs"),
        (["--task=embed", "--text=a", "--colour=red"], "--colour"),
    ],
)
def test_wrong_inputs(run, images, tmp_path, arguments, message):
    status, out, err = run(*[argument.format(images=images, tmp=tmp_path) for argument in arguments])
    assert status == 2 and not out
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and message in err, err


def test_missing_checkpoint(capsys):
    with pytest.raises(SystemExit) as caught:
        predict.main(["/nowhere", "--task=embed", "--text=a"])
    assert caught.value.code == 2 and "no such checkpoint: /nowhere" in capsys.readouterr().err
