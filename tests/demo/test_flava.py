import contextlib
import importlib
import io
import json
import math
import re

import numpy as np
import pytest

import train
import vlm
from vlm.config import build, parse_command
from vlm.demo import __main__ as demo
from vlm.demo import digits, flava, page, scenes, steps
from vlm.demo.held_out import HeldOut
from vlm.schema import Config

eval_command = importlib.import_module("eval")

SHORT = (
    "--config.train.steps=8",
    "--config.optimizer.schedule.warmup_steps=2",
    "--config.data.batch_size=24",
    "--config.train.tensorboard=False",
)


def here(command):
    """`steps.python` without another Python; of eval.py only what it is asked for is looked at."""
    if command[0] == "train.py":
        assert train.main(command[1:]) == 0
        return ""
    options, config = parse_command(eval_command.arguments(), command[1:])
    assert config is not None
    opened = vlm.evaluation.prepare(build(Config, config, "").eval).evaluators
    assert (
        set(opened) == {"probe_left", "probe_larger", "probe_single", "matching", "retrieval"}
        and opened["matching"][0].size == 96
    )
    assert options.output.endswith("_results.json")
    trained = not options.checkpoint.endswith("random")
    model, _, processor = vlm.load(options.checkpoint)
    assert model.config.image_vocab_size == 64 and processor.max_length == 13
    return json.dumps(dict.fromkeys(flava.METRICS, 0.9 if trained else 0.1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole chain through the commands' own functions: (folder, exit status, standard output)."""
    output, out = tmp_path_factory.mktemp("flava"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(steps, "python", here)
        patch.setattr(scenes, "SCENES", {"train": 40, "test": 48})
        patch.setattr(digits, "DIGITS", {"train": 60, "test": 24})
        status = flava.digits(output, overrides=SHORT)
    return output, status, out.getvalue()


def test_the_chain_from_data_to_page(finished):
    output, status, out = finished
    assert status == 1 and len(out.strip().splitlines()) == 1  # eight steps are too few for the marks
    found = json.loads(out)
    assert found["start"]["contrastive"] == pytest.approx(math.log(24)) and found["start"]["mim"] == math.log(64)
    for name in ("random", "trained"):
        assert set(flava.LOSSES) | set(flava.METRICS) <= set(found[name])
    for loss, start in found["start"].items():
        assert abs(found["random"][loss] - start) < 0.35
    assert found["random"]["mmm_text"] - found["trained"]["mmm_text"] > 0.1
    text = (output / "flava.html").read_text()
    assert text.count("<img") == 3 * 2 * page.SHOWN and "http" not in re.sub(r"http-equiv", "", text)
    assert not (output / "flava_pictures.html").exists() and "90.0%" in text
    assert found["frequencies"]["mlm"] < found["start"]["mlm"] and found["frequencies"]["itm"] <= math.log(2)


def test_held_out_batches_are_always_the_same(finished):
    output, _, _ = finished
    sources = {name: [spec] for name, spec in digits.sources(str(output), "test").items()}
    first, again = (HeldOut.of(output / "flava_run", sources).batches for _ in range(2))
    assert {name: len(batches) for name, batches in first.items()} == {"pairs": 2, "images": 1, "text": 4}
    for name, batches in first.items():
        for one, other in zip(batches, again[name], strict=True):
            for key, array in one.items():
                np.testing.assert_array_equal(array, other[key])


def test_marks():
    random = dict.fromkeys(flava.FALLS, 4.0)
    trained = {name: 3.999 - fall for name, fall in flava.FALLS.items()} | flava.MARKS
    assert flava.missed(random, trained) == []
    assert flava.missed(random, trained | {"itm": 4.0, "matching/accuracy": 0.1}) == ["itm", "matching/accuracy"]
    assert flava.missed(random, trained | {"mim": float("nan")}) == ["mim"]


def test_the_page_paints_what_was_guessed():
    means = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (255, 0, 100)])
    labels, hidden = np.zeros((1, 36), int), np.zeros((1, 36), bool)
    labels[0, 7], hidden[0, 7], guessed = 1, True, np.full((1, 36), 2)
    batch = {"patch_mask": hidden, "patch_labels": labels}
    for image, value in zip(page._painted(batch, guessed, means, 0), (page.GREY, 100, 0), strict=True):
        assert (image[4:8, 4:8] == value).all() and image.sum() == 255 * 3 * 560 + 3 * 16 * value


def test_only_data(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(flava, "digits", lambda *options: called.append(options) or 0)
    assert demo.main(["flava", f"--output={tmp_path}", "--data_only"]) == 0 and called == [(tmp_path, True)]
