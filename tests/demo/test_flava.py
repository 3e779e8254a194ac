import contextlib
import functools
import importlib
import io
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import train
import vlm
from vlm import sharding
from vlm.config import build, parse_command, parse_config_flag
from vlm.demo import __main__ as demo
from vlm.demo import digits, flava, nlvr, nlvr_pairs, page, scenes, steps, visual_words
from vlm.demo.held_out import HeldOut
from vlm.schema import Config

eval_command = importlib.import_module("eval")

SHORT = (
    "--config.train.steps=6",
    "--config.optimizer.schedule.warmup_steps=2",
    "--config.data.batch_size=16",
    "--config.train.tensorboard=False",
)
EVALUATIONS = {"probe_left", "probe_single", "matching", "retrieval"}


def python(command):
    """`steps.python` without another Python; of eval.py only what it is asked for is looked at."""
    if command[0] == "train.py":
        assert train.main(command[1:]) == 0
        return ""
    options, config = parse_command(eval_command.arguments(), command[1:])
    assert config is not None
    opened = vlm.evaluation.prepare(build(Config, config, "").eval).evaluators
    assert set(opened) == EVALUATIONS | {"matching_nlvr", "retrieval_nlvr"}
    assert opened["matching"][0].size == 48 and opened["matching_nlvr"][0].size >= 32
    assert options.output.endswith("_results.json")
    trained = not options.checkpoint.endswith("random")
    model, _, processor = vlm.load(options.checkpoint)
    assert model.config.image_vocab_size == visual_words.COUNT and processor.max_length == 22
    return json.dumps(dict.fromkeys(flava.METRICS, 0.9 if trained else 0.1))


def drawn(count, width):
    """Scenes of one block, `width` pixels wide, with eight sentences in turn."""
    rows = []
    for number in range(count):
        pixels = np.full((nlvr.SIDE, 400, 3), nlvr.GROUND, np.uint8)
        pixels[number % 80 :, :width] = nlvr.COLORS["blue"]
        rows.append(nlvr.Example(pixels, f"there are {number % 8} blue items", number % 16 < 12))
    return rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The whole chain through the commands' own functions, on one device: (folder, exit status, outputs).

    Compiled fast rather than well: it runs a few steps only.
    """
    output, out, err = tmp_path_factory.mktemp("flava"), io.StringIO(), io.StringIO()
    one_device = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(steps.ROOT)
        patch.setattr(sharding, "make_mesh", one_device)
        patch.setattr(steps, "python", python)
        patch.setattr(nlvr, "archives", lambda source: ("train", "test"))
        patch.setattr(nlvr, "examples", lambda name: drawn(24, 40) if name == "train" else drawn(144, 20))
        patch.setattr(visual_words, "FITTED", 1000)
        patch.setattr(scenes, "SCENES", {"train": 40, "test": 24})
        patch.setattr(digits, "DIGITS", {"train": 60, "test": 24})
        jax.config.update("jax_disable_most_optimizations", True)
        try:
            status = flava.train(flava.Story(output, output, seed=3), overrides=SHORT)
        finally:
            jax.config.update("jax_disable_most_optimizations", False)
    return output, status, out.getvalue(), err.getvalue()


@pytest.mark.long
def test_the_chain_from_data_to_page(finished):
    output, status, out, err = finished
    assert status == 1 and len(out.strip().splitlines()) == 1  # six steps are too few for the marks
    assert "nlvr/mlm misses its mark" in err and "digits only" not in err
    found = json.loads(out)
    choices = {"contrastive": 16, "itm": 2, "mim": visual_words.COUNT, "mlm": nlvr.VOCABULARY}
    assert {name: found["start"][name] for name in choices} == pytest.approx(
        {name: math.log(count) for name, count in choices.items()}
    )
    for name in ("random", "trained"):
        assert {f"{kind}/{loss}" for kind in flava.KINDS for loss in flava.LOSSES} <= set(found[name])
        assert set(flava.METRICS) <= set(found[name])
    for kind in flava.KINDS:
        for loss, start in found["start"].items():
            assert abs(found["random"][f"{kind}/{loss}"] - start) < 0.5
        assert found["random"][f"{kind}/mmm_text"] - found["trained"][f"{kind}/mmm_text"] > 0.1
        assert found["frequencies"][f"{kind}/mlm"] < found["start"]["mlm"]
    text = (output / "flava_nlvr_3.html").read_text()
    assert text.count("<img") == 3 * 4 * page.SHOWN and "http" not in re.sub(r"http-equiv", "", text)
    assert not (output / "flava_nlvr_3_pictures.html").exists() and "+80.0%" in text
    settings = json.loads((output / "flava_nlvr_3_run" / "config.json").read_text())
    assert settings["train"]["seed"] == settings["data"]["seed"] == 3


@pytest.mark.long
def test_held_out_batches_are_always_the_same(finished):
    output, run = finished[0], finished[0] / "flava_nlvr_3_run"
    held_out = HeldOut.of(run)
    first, again = (held_out.batches(digits.sources(str(output), "test")) for _ in range(2))
    assert {name: len(batches) for name, batches in first.items()} == {"pairs": 2, "images": 1, "text": 3}
    for name, batches in first.items():
        for one, other in zip(batches, again[name], strict=True):
            for key, array in one.items():
                np.testing.assert_array_equal(array, other[key])
    drawings = held_out.batches(nlvr_pairs.sources(str(output / "nlvr_pairs"), "test"))
    assert {"image", "tokens", "itm_labels", "patch_labels"} <= drawings["pairs"][0].keys()


@pytest.mark.parametrize("name,texts", [("digits", 18), ("nlvr", 22)])
def test_the_configuration_reads_from_the_folder_it_is_given(name, texts):
    settings = build(Config, parse_config_flag(f"{steps.ROOT}/configs/flava_digits.py:{name},/elsewhere"), "")
    paths = {source["path"] for source in settings.data.sources}
    assert all(path.startswith("/elsewhere/") and "_train" in path for path in paths)
    assert any("nlvr" in path for path in paths) == (name == "nlvr") == ("matching_nlvr" in settings.eval)
    assert settings.model["text"]["max_length"] == texts and set(settings.eval) >= EVALUATIONS


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="choose from digits, nlvr"):
        parse_config_flag(f"{steps.ROOT}/configs/flava_digits.py:shapes")


def test_marks():
    random = {f"{kind}/{loss}": 4.0 for kind in flava.KINDS for loss in flava.LOSSES} | dict.fromkeys(flava.GAINS, 0.3)
    trained = {f"{kind}/{name}": 3.999 - fall for kind, falls in flava.FALLS.items() for name, fall in falls.items()}
    trained |= flava.MARKS | {name: 0.301 + gain for name, gain in flava.GAINS.items()}
    kinds, low = list(flava.KINDS), {"digits/itm": 4.0, "matching/accuracy": 0.1, "probe_single/top1": 0.3}
    assert flava.missed(kinds, random, trained) == []
    assert flava.missed(kinds, random, trained | low) == ["digits/itm", "probe_single/top1", "matching/accuracy"]
    assert flava.missed(kinds, random, trained | {"nlvr/mim": float("nan")}) == ["nlvr/mim"]
    assert flava.missed(["digits"], random, trained | {"nlvr/mim": float("nan")}) == []


def test_the_page_paints_what_was_guessed():
    means = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (255, 0, 100)])
    labels, hidden = np.zeros((1, 36), int), np.zeros((1, 36), bool)
    labels[0, 7], hidden[0, 7], guessed = 1, True, np.full((1, 36), 2)
    batch = {"patch_mask": hidden, "patch_labels": labels}
    for image, value in zip(page._painted(batch, guessed, means, 0), (page.GREY, 100, 0), strict=True):
        assert (image[4:8, 4:8] == value).all() and image.sum() == 255 * 3 * 560 + 3 * 16 * value


def test_only_data(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(flava, "train", lambda *options: called.append(options) or 0)
    assert demo.main(["flava", f"--output={tmp_path}", "--data_only"]) == 0
    assert demo.main(["flava", f"--output={tmp_path}", "--nlvr=x", "--seed=2"]) == 0
    assert called == [(flava.Story(tmp_path), True), (flava.Story(tmp_path, Path("x"), 2), False)]


def test_each_run_has_its_own_files(tmp_path):
    stories = (flava.Story(tmp_path), flava.Story(tmp_path, tmp_path), flava.Story(tmp_path, tmp_path, 1))
    assert [story.path("_run").name for story in stories] == ["flava_digits_run", "flava_nlvr_run", "flava_nlvr_1_run"]
    assert [story.kinds for story in stories] == [["digits"], ["digits", "nlvr"], ["digits", "nlvr"]]


def test_digits_alone_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flava, "_prepare", str)
    assert flava.train(flava.Story(tmp_path), data_only=True) == 0
    assert "digits only; --nlvr=DIR adds" in capsys.readouterr().err
    assert flava.train(flava.Story(tmp_path, tmp_path), data_only=True) == 0
    assert "digits only" not in capsys.readouterr().err
