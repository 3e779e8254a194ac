"""Every shipped configuration: known settings only, models of the published sizes, schedules as published."""

import importlib
import json
import math

import jax
import numpy as np
import pytest

import train
from vlm import evaluation
from vlm.config import build, parse_config_flag
from vlm.demo.prepare import png
from vlm.experiment import experiment
from vlm.models import get_family
from vlm.optimizer import learning_rate
from vlm.schema import Config
from vlm.sharding import unbox
from vlm.tree import flatten

from .data.test_visdial import write as visdial

blip = importlib.import_module("configs.blip")
SMALL = ("tiny", "nlvr_tiny", "nlvr_caption", "nlvr_simple", "digits_caption", "digits_vqa")
BLIP = [*SMALL, *blip.PUBLISHED]
ALTCLIP = [
    f"{size}{stage}" for size in ("tiny", "altclip", "m9", "m18") for stage in ("", "_teacher", "_teacher_cached")
]
VARIANTS = [f"configs/blip.py:{name}" for name in BLIP] + [f"configs/altclip.py:{name}" for name in ALTCLIP]


def settings_of(flag):
    return build(Config, parse_config_flag(flag), "")


@pytest.mark.parametrize("flag", VARIANTS)
def test_all_settings_are_known(flag):
    settings = settings_of(flag)
    family = get_family(settings.family)
    model = build(family.config_type, settings.model, "model")
    loss = build(family.loss_type, settings.loss, "loss")
    processor = build(family.processor_type, settings.processor, "processor")
    assert processor.image.output_size == (model.vision.image_size,) * 2
    rate = learning_rate(settings.optimizer, settings.train.steps)
    assert float(rate(settings.train.steps // 2)) > 0
    group = getattr(loss, "group_size", None)
    if group is not None:
        assert settings.data.batch_size % group == 0 and loss.queue_size % settings.data.batch_size == 0


PARAMETERS = {
    "base": 252_046_652 + 768 * 256 * 2 + 512 + 768 * 2 + 2 + 1,  # the paper's 252 M, and the heads
    "base_caption": 223_971_644,
    "large_caption": 446_290_492,
    "base_vqa": 361_230_140,
    "base_retrieval_coco": 223_744_258 + 1,  # and the temperature
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes(name):
    parts = experiment(settings_of(f"configs/blip.py:{name}"))
    params = flatten(unbox(jax.eval_shape(lambda: parts.init.init_params(jax.random.key(0)))))
    model, expected = sum(math.prod(leaf.shape) for leaf in params.values()), PARAMETERS[name]
    grid = parts.model_config.vision.num_patches - (196 if name == "base" else 576)  # counted at 224 and 384 pixels
    assert model - grid * parts.model_config.vision.hidden_size == expected


def test_pretraining_follows_the_published_schedule():
    settings = settings_of("configs/blip.py:base_pretrain_code")
    rate = learning_rate(settings.optimizer, settings.train.steps)
    epoch = settings.train.steps // 20
    expected = [1e-6, (1e-6 + 3e-4) / 2, 3e-4, 3e-4, 3e-4 * 0.9, 3e-4 * 0.9**7]
    found = [rate(step) for step in (0, 1500, 3000, epoch - 1, epoch, 7 * epoch + 5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert settings.optimizer.decay_exclude == () and settings.optimizer.bounds == (("temperature", 0.001, 0.5),)


@pytest.mark.parametrize("name", ["base", "large", "base_pretrain_code"])
def test_pretraining_draws_a_fifth_of_laion_per_epoch(name):
    """And every other pair once: whatever the files' sizes, of which LAION's is nine tenths."""
    settings = settings_of(f"configs/blip.py:{name}")
    weights = {source["path"].split("/")[-1]: source["weight"] for source in settings.data.sources}
    epoch = settings.train.steps // 20 * settings.data.batch_size
    drawn = {source: epoch * weight / sum(weights.values()) for source, weight in weights.items()}
    assert drawn["laion.json"] == pytest.approx(115e6 / 5, rel=1e-3)
    assert drawn["coco.json"] == pytest.approx(567e3, rel=1e-3) and len(drawn) == 6
    assert sum(drawn.values()) - drawn["laion.json"] == pytest.approx(15.2e6, rel=1e-3)


def test_fine_tuning_follows_a_cosine_of_epochs():
    settings = settings_of("configs/blip.py:base_vqa")
    rate = learning_rate(settings.optimizer, settings.train.steps)
    epoch = settings.train.steps // 10
    expected = [2e-5, 2e-5, 1e-5 * (1 + np.cos(0.1 * np.pi)), 1e-5 * (1 + np.cos(0.9 * np.pi))]
    np.testing.assert_allclose([rate(step) for step in (0, epoch - 1, epoch, 10 * epoch - 1)], expected, rtol=1e-5)


def test_published_evaluations_open_the_published_files(tmp_path, monkeypatch):
    pair, many = {"sentence": "a", "label": "True", "images": ["x.png"] * 2}, {"image": "x.png", "caption": ["a", "b"]}
    asked = {"question_id": 1, "question": "what?", "image": "x.png", "dataset": "vqa"}
    files = {
        "coco/coco_karpathy_test": [many],
        "flickr30k/flickr30k_test": [many],
        "nocaps/nocaps_val": [{"image": "x.png", "img_id": 3}],
        "vqa/vqa_test": [asked],
        "vqa/answer_list": ["yes", "no"],
        "nlvr2/nlvr_dev": [pair],
        "nlvr2/nlvr_test": [pair],
    }
    for name, content in files.items():
        path = tmp_path / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        (path.parent / "x.png").write_bytes(png(np.zeros((2, 2, 3), np.uint8)))
    (tmp_path / "data/visdial").mkdir()
    for path, name in zip(visdial(tmp_path / "data/visdial", b"x"), ("val", "val_dense_annotations"), strict=True):
        path.rename(path.with_name(f"visdial_1.0_{name}.json"))
    clip = {"clip_name": "video1", "video": "video1", "caption": "a", "question": "what?", "answer": "yes"}
    for name, content in (("msrvtt_test.jsonl", clip), ("test_qa.json", [clip]), ("answer_list.json", ["yes", "no"])):
        (tmp_path / "data/msrvtt/frames/video1").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data/msrvtt" / name).write_text(json.dumps(content) + "\n")
    (tmp_path / "data/msrvtt/frames/video1/001.png").write_bytes(png(np.zeros((2, 2, 3), np.uint8)))
    settings = {name: settings_of(f"configs/blip.py:{name}") for name in blip.PUBLISHED}
    settings |= {name: settings_of(f"configs/blip_evaluations.py:{name}") for name in ("msrvtt", "msrvtt_qa")}
    monkeypatch.chdir(tmp_path)
    assert len(evaluation.prepare(settings["msrvtt"].eval).evaluators["videos"][0].source[0]["image"]) == 8
    opened = {name: evaluation.prepare(each.eval).evaluators for name, each in settings.items()}
    assert sum(map(len, opened.values())) == 2 * 7 + 3 and set(opened["base_caption"]) == {"coco", "nocaps"}


@pytest.mark.parametrize("flag", ["configs/blip.py:base_retrieval_coco", "configs/blip.py:tiny,/nowhere"])
def test_dry_run(flag, capsys):
    assert train.main([f"--config={flag}", "--dry_run"]) == 0
    report = capsys.readouterr().out
    assert "extra" in report and "image_queue" not in report.split("== replicated")[1].split("==")[0]
    assert "tokens" in report


def test_a_dry_run_shows_what_the_objective_reads_of_absent_data(capsys):
    assert train.main(["--config=configs/altclip.py:tiny_teacher,/nowhere", "--dry_run"]) == 0
    arrays = capsys.readouterr().out.split("== one batch\n")[1].split("from the settings")[0]
    assert [line.split()[0] for line in arrays.splitlines()[1:]] == ["mask", "teacher_mask", "teacher_tokens", "tokens"]


@pytest.mark.parametrize("variant", ["huge", "base_retrieval", "large_dialog"])
def test_unknown_variants_are_named(variant):
    with pytest.raises(ValueError, match=f"unknown variant '{variant}'; choose from tiny, nlvr_tiny"):
        blip.get_config(variant)
