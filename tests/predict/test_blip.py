"""Captions, answers, matching and localisation from the command line, on model folders."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image

import vlm
from vlm import predict
from vlm.errors import UserError
from vlm.generation import generate
from vlm.models.blip.model import BLIP

from ..quick import random_params


def shared(tiny_blip, **parts):
    """A model whose encoder and decoder share what they can, of random weights."""
    retrieval, _, processor = tiny_blip("retrieval")
    model = BLIP(dataclasses.replace(retrieval.config, shared_decoder=True, **parts))
    tokens = np.zeros((1, 2), np.int32)
    return model, random_params(model, np.zeros((1, 24, 24, 3), np.float32), tokens), processor.for_task("caption")


SHARED = {  # a pretraining model, and one that was made to describe only
    "pretrain": shared,
    "describe": functools.partial(shared, projection_dim=None, itm=False, temperature=None),
}


@pytest.fixture(scope="module")
def folder(tiny_blip, tmp_path_factory):
    """Saves the model of a task and returns its folder."""
    made = {}

    def make(task):
        if task not in made:
            made[task] = tmp_path_factory.mktemp(task) / "model"
            vlm.save(made[task], *(SHARED[task](tiny_blip) if task in SHARED else tiny_blip(task)))
        return made[task]

    return make


@pytest.fixture
def run(folder, capsys):
    def call(task, *arguments):
        try:
            status = predict.main([str(folder(task)), *map(str, arguments)])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def images(scenes_folder):
    return sorted((scenes_folder / "images").glob("test_*.png"))[:3]


def answer(out):
    return json.loads(out.splitlines()[-1])


def test_captions(run, images, tiny_blip, tmp_path):
    flags = [f"--image={path}" for path in images]
    output = tmp_path / "o.json"
    flags += ["--batch_size=3", "--max_new_tokens=4", "--num_return_sequences=2", f"--output={output}"]
    status, out, _ = run("caption", "--task=caption", *flags)
    assert status == 0 and json.loads(output.read_text()) == answer(out)
    model, params, processor = tiny_blip("caption")
    batch = processor(images=images, texts=["a picture of "] * 3)
    settings = {"num_beams": 3, "min_length": 5, "beam_normalisation": "legacy", "max_new_tokens": 4}
    settings["num_return_sequences"] = 2
    found = generate(model, params, batch, **settings)
    for number, row in enumerate(answer(out)["results"]):
        assert row["caption"] == processor.tokenizer.decode(found.completions[2 * number].tolist())
        assert row["score"] == pytest.approx(float(found.scores[2 * number]), abs=1e-4)
        assert len(row["all"]) == 2 and row["all"][0]["text"] == row["caption"] and row["prompt"] == "a picture of "
        assert row["image"] == str(images[number])


def test_unconditional_captions(run, images, monkeypatch):
    """What the model is then given; that it writes from it as Hugging Face's does is tested with the model."""
    seen = []

    def generate(model, params, batch, config):
        seen.append(set(batch))
        raise UserError("seen")

    monkeypatch.setattr("vlm.predict.writing.generate", generate)
    for text in ([], ["--text="], ["--text=a"]):
        assert run("caption", "--task=caption", f"--image={images[0]}", *text)[0] == 2
    assert seen == [{"image", "tokens", "mask"}, {"image"}, {"image", "tokens", "mask"}]


def test_answers(run, images, tiny_blip):
    questions = ["which digit is larger?", "is there a two?"]
    texts = [f"--text={q}" for q in questions]
    status, out, _ = run(
        "vqa", "--task=answer", f"--image={images[0]}", f"--image={images[1]}", *texts, "--num_beams=1"
    )
    rows = answer(out)["results"]
    assert status == 0 and [row["question"] for row in rows] == questions * 2
    model, params, processor = tiny_blip("vqa")
    batch = processor(images=[images[0], images[0], images[1], images[1]], texts=questions * 2)
    found = generate(model, params, batch, max_length=10, min_length=1)
    expected = [processor.tokenizer.decode(ids.tolist()) for ids in found.completions]
    assert [row["answer"] for row in rows] == expected


def test_matching_and_classes(run, images, tiny_blip):
    texts = ["a five on the left", "a two on the right", "an eight"]
    flags = [f"--text={text}" for text in texts]
    status, out, _ = run("retrieval", "--task=match", f"--image={images[0]}", *flags, "--batch_size=2")
    model, params, processor = tiny_blip("retrieval")
    batch = processor(images=[images[0]] * 3, texts=texts)
    apply = jax.jit(lambda batch, head: model.apply({"params": params}, **batch, use_itm_head=head), static_argnums=1)
    logits, compared = np.asarray(apply(batch, True).itm_score, np.float64), apply(batch, False)
    rows = answer(out)["results"]
    expected = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    np.testing.assert_allclose([row["probability"] for row in rows], expected, atol=1e-4)
    np.testing.assert_allclose([row["cosine"] for row in rows], compared.itm_score[0], atol=1e-4)
    status, out, _ = run("retrieval", "--task=classify", f"--image={images[0]}", *flags)
    found = {row["label"]: row["probability"] for row in answer(out)["results"][0]["labels"]}
    logits = np.asarray(compared.logits_per_image[0], np.float64)  # cosines / temperature
    np.testing.assert_allclose([found[text] for text in texts], np.exp(logits) / np.exp(logits).sum(), atol=1e-4)
    status, out, _ = run("classification", "--task=match", f"--image={images[0]}", flags[0])
    assert status == 0 and set(answer(out)["results"][0]) == {"image", "text", "probability"}


def test_localise(run, images, tmp_path):
    output = tmp_path / "where.png"
    flags = [f"--image={images[0]}", "--text=a five on the left", f"--output={output}"]
    status, out, _ = run("retrieval", "--task=localise", *flags)
    found = answer(out)
    assert status == 0 and [row["text"] for row in found["maps"]][2:] == ["a", "five", "on", "the", "left"]
    assert all(0 < row["peak"][axis] < 1 for row in found["maps"] for axis in "xy")
    with Image.open(output) as page:
        assert page.size[0] > 4 * 256
    assert not list(tmp_path.glob(".*"))
    status, _, err = run("retrieval", "--task=localise", *flags, "--layer=9")
    assert status == 2 and "layer: expected a number from 0 to 0" in err


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("retrieval", ["--task=caption"], "no decoder"),
        ("vqa", ["--task=caption"], "questions"),
        ("caption", ["--task=answer", "--text=a?"], "model that answers questions"),
        ("caption", ["--task=match", "--text=a"], "neither a matching head nor a joint space"),
        ("caption", ["--task=classify", "--text=a", "--text=b"], "BLIP: this model has no joint space"),
        ("classification", ["--task=classify", "--text=a", "--text=b"], "BLIP: this model has no joint space"),
        ("classification", ["--task=embed"], "--task=embed: BLIP: this model has no joint space"),
        ("caption", ["--task=localise", "--text=a", "--output={tmp}/x.png"], "matching head"),
        ("retrieval", ["--task=localise", "--text=a"], "needs one --image, one --text and --output"),
        ("retrieval", ["--task=localise", "--text=a", "--output={tmp}/x.jpg"], "ends in .png"),
        ("retrieval", ["--task=match", "--text=a", "--num_beams=2"], "--num_beams belongs to --task=caption"),
        ("retrieval", ["--task=match", "--text=a", "--layer=2"], "--layer belongs to"),
        ("caption", ["--task=caption", "--text=a", "--text=b"], "takes one --text"),
        (
            "caption",
            ["--task=caption", "--temperature=2"],
            ": --temperature: only draws use it; expected --do_sample\n",
        ),
        ("caption", ["--task=caption", "--temperature=nan"], ": --temperature: expected a finite number, found nan"),
        ("caption", ["--task=caption", "--do_sample", "--temperature=0"], "found 0.0; greedy is without --do_sample"),
        ("caption", ["--task=caption", "--max_length=9", "--max_new_tokens=3"], ": --max_length: expected only one of"),
        ("vqa", ["--task=answer", "--text=a?", "--top_p=0.5"], ": --top_p: only draws use it; expected --do_sample"),
        ("caption", ["--task=caption", "--seed=4"], ": --seed: only draws use it"),
        ("caption", ["--task=caption", "--num_beams=1", "--length_penalty=3"], "only beam search uses it"),
        ("caption", ["--task=caption", "--num_beams=1", "--beam_normalisation=legacy"], "only beam search uses it"),
        ("caption", ["--task=caption", "--text=" + "a " * 21], "a prompt of 22 tokens"),
        ("caption", ["--task=caption", "--text=" + "a " * 30, "--max_new_tokens=3"], "at most 24 tokens, found 31"),
        ("vqa", ["--task=answer", "--text=" + "what " * 60], "tokens, found 62: what what"),
        ("caption", ["--task=caption", "--num_beams=0"], ": --num_beams: expected at least 1"),
    ],
)
def test_wrong_calls(run, images, tmp_path, model, arguments, message):
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    status, out, err = run(model, f"--image={images[0]}", *given)
    assert status == 2 and not out and not list(tmp_path.iterdir())
    assert err.startswith("error: ") and len(err.strip().splitlines()) == 1 and message in err, err


@pytest.mark.parametrize("arguments", [["--task=match"], ["--task=localise", "--output={tmp}/x.png"]])
@pytest.mark.parametrize("model", ["retrieval", "classification"])
def test_pictures_of_another_size_than_the_model_reads(tiny_blip, images, tmp_path, capsys, model, arguments):
    """A folder whose image settings were exchanged; the one model has a joint space, the other the head alone."""
    module, params, processor = tiny_blip(model)
    image = dataclasses.replace(processor.config.image, size=32)
    processor = type(processor)(processor.tokenizer, dataclasses.replace(processor.config, image=image))
    vlm.save(tmp_path / "model", module, params, processor)
    flags = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        predict.main([str(tmp_path / "model"), f"--image={images[0]}", "--text=a five", *flags])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and not out and not (tmp_path / "x.png").exists()
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert "expected 24x24 pixels, found 32x32" in err, err


def test_captions_of_a_pretraining_model_come_with_a_note(run, images, monkeypatch):
    """Only of a model that has all of its parts; answers and a captioner's captions without one."""

    def check(*inputs, **options):
        raise UserError("seen")

    monkeypatch.setattr("vlm.predict.writing.check_writes", check)
    note = "note: this is a pretraining model; one fine-tuned for captions writes better\n"
    assert run("pretrain", "--task=caption", f"--image={images[0]}")[2] == f"{note}error: seen\n"
    assert run("caption", "--task=caption", f"--image={images[0]}")[2] == "error: seen\n"
    assert run("describe", "--task=caption", f"--image={images[0]}")[2] == "error: seen\n"
