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
from vlm.data.source import open_source
from vlm.demo.prepare import png
from vlm.experiment import experiment
from vlm.models import get_family
from vlm.optimizer import learning_rate
from vlm.schema import Config
from vlm.sharding import unbox
from vlm.tree import flatten

from .data.test_visdial import write as visdial
from .evaluation import conftest as colours
from .quick import random_params

blip = importlib.import_module("configs.blip")
altclip_evaluations = importlib.import_module("configs.altclip_evaluations")
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
    snli_ve(tmp_path, ("dev", "test"))
    (tmp_path / "data/msrvtt/frames/video1/001.png").write_bytes(png(np.zeros((2, 2, 3), np.uint8)))
    settings = {name: settings_of(f"configs/blip.py:{name}") for name in blip.PUBLISHED}
    settings |= {name: settings_of(f"configs/blip_evaluations.py:{name}") for name in ("msrvtt", "msrvtt_qa")}
    monkeypatch.chdir(tmp_path)
    assert len(evaluation.prepare(settings["msrvtt"].eval).evaluators["videos"][0].source[0]["image"]) == 8
    opened = {name: evaluation.prepare(each.eval).evaluators for name, each in settings.items()}
    assert sum(map(len, opened.values())) == 2 * 9 + 3 and set(opened["base_caption"]) == {"coco", "nocaps"}


def published_retrieval(folder):
    """Writes the files of AltCLIP's retrieval sets, a thousand images of five colours; five of the texts say which."""
    names = list(colours.COLOURS)
    pixels = {name: png(np.full((2, 2, 3), value, np.uint8)) for name, value in colours.COLOURS.items()}
    images = [f"COCO_{'val' if i % 2 else 'train'}2014_{i:012d}" for i in range(1000)]
    words = [names[i % 5] if i < 5 else "photo" for i in range(1000)]
    for i, image in enumerate(images):
        for place in (f"coco/{image.split('_')[1]}/{image}.jpg", f"flickr30k/flickr30k_images/{i}.jpg"):
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(pixels[names[i % 5]])
    files = {
        "flickr30k/test.jsonl": [json.dumps({"image": "flickr30k_images/0.jpg", "text": ["red"] * 5})],
        "coco/coco_karpathy_test.json": [json.dumps([{"image": f"train2014/{images[0]}.jpg", "caption": ["red"] * 5}])],
        "flickr30k_cn/flickr30k_test_CNA.txt": ["image,caption", *(f"{i}.jpg,{word}" for i, word in enumerate(words))],
        "coco-cn-version1805v1.1/coco-cn_test.txt": images,
        "xtd10/XTD10/test_image_names.txt": [f"{image}.jpg" for image in images],
        **{f"xtd10/{file}": words for file in altclip_evaluations.XTD_FILES.values()},
    }
    for file, first in (("MIC/test_1kcaptions_fr.txt", 1), ("STAIR/test_1kcaptions_jp.txt", 2)):  # of other images
        files[f"xtd10/{file}"] = [*words[first:5], *words[:first], *words[5:]]
    for name, tag, separator in (("human-written", "#0", "\t"), ("manually-translated", "#zhm#0", " ")):
        lines = [f"{image}{tag}{separator}{word}" for image, word in zip(images, words, strict=True)]
        files[f"coco-cn-version1805v1.1/imageid.{name}-caption.txt"] = lines[::-1]
    for name, lines in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_altclip_is_evaluated_on_the_published_retrieval_sets(tmp_path, monkeypatch):
    specs = {
        size: {
            name: {**spec, "bootstrap": {"resamples": 0}}
            for name, spec in settings.eval.items()
            if spec["kind"] == "retrieval"
        }
        for size in ("altclip", "m9", "m18")
        for settings in [settings_of(f"configs/altclip_evaluations.py:{size}")]
    }
    assert set(specs["altclip"]) == {"flickr30k", "flickr30k_cn", "coco", "coco_cn_1k", "coco_cn_5k"}
    published = ("en", "es", "fr", "zh", "it", "ko", "ru", "ja")
    assert set(specs["m9"]) == {"flickr30k", *(f"xtd_{code}" for code in published)}
    assert len(specs["m18"]) == 1 + 11
    published_retrieval(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    words = np.zeros((len(colours.WORDS), 3), np.float32)
    words[1:6] = np.array(list(colours.COLOURS.values())) / 255
    params = {"words": words, "projection": np.eye(3, dtype=np.float32)}
    tiny = (colours.ColourModel(), params, colours.ColourProcessor())
    metrics = {
        size: evaluation.run(evaluation.prepare(each, limit=5), *tiny, progress=False)
        for size, each in specs.items()
        if size != "m18"
    }
    found = {name: metrics["m9"][f"xtd_{name}/image_to_text_recall@1"] for name in ("en", "ko", "fr", "ja")}
    assert found == {"en": 1.0, "ko": 1.0, "fr": 0.0, "ja": 0.0}
    assert all(metrics["m9"][f"xtd_{name}/image_to_text_recall@10"] == 1.0 for name in found)
    for name in ("flickr30k_cn", "coco_cn_1k", "coco_cn_5k"):
        assert metrics["altclip"][f"{name}/mean_recall"] == 1.0


ENTAILED = ("contradiction", "neutral", "entailment")


def snli_ve(folder, parts, rows=6):
    """Pictures, and lines of the published form."""
    images, texts = folder / "data/flickr30k/flickr30k_images", folder / "data/snli_ve"
    images.mkdir(parents=True)
    texts.mkdir(parents=True)
    for row in range(rows):
        (images / f"{row}7.jpg").write_bytes(png(np.full((40, 30, 3), 40 * row, np.uint8)))
    for part in parts:
        lines = []
        for row in range(rows):
            words = "a two on the left" if row % 2 else "a five on the right"
            line = {"Flickr30K_ID": f"{row}7", "Flikr30kID": f"{row}7.jpg", "annotator_labels": ["neutral"]}
            line |= {"captionID": f"{row}7.jpg#0", "gold_label": ENTAILED[row % 3], "pairID": f"{row}7.jpg#0r1n"}
            line |= {"sentence1": "A premise.", "sentence1_binary_parse": "( A premise )", "sentence2": words}
            lines.append(json.dumps(line | {"sentence2_binary_parse": words, "sentence1_parse": "", "extra": None}))
        (texts / f"snli_ve_{part}.jsonl").write_text("\n".join(lines) + "\n")


def test_snli_ve_from_the_published_files_to_a_batch_and_an_evaluation(tmp_path, monkeypatch, scenes_folder):
    """The variants' own sources, objective and evaluations, with a small model of their parts."""
    small, large = (settings_of(f"configs/blip.py:{name}") for name in ("tiny,/nowhere", "large_classification"))
    small, config = small.model, parse_config_flag("configs/blip.py:base_classification")
    with config.unlocked(), config.ignore_type():
        stack, vision = dict(small["text"], max_length=64), dict(small["vision"], image_size=24, patch_size=8)
        ids = {name: value for name, value in small.items() if name.endswith("_id")}
        config.model.update({"vision": vision, "text": stack, **ids})
        config.processor.update({"tokenizer": str(scenes_folder / "tokenizer")})
        config.processor.image.size = 24
    settings = build(Config, config, "")
    assert (large.data.sources, large.eval, large.loss) == (settings.data.sources, settings.eval, {**settings.loss})
    snli_ve(tmp_path, ("train", "dev", "test"))
    monkeypatch.chdir(tmp_path)
    parts = experiment(settings)
    (source,) = map(open_source, settings.data.sources)
    reading = build(parts.family.processor_type, settings.processor, "processor")
    processor = parts.family.processor.from_config(reading.for_run(parts.model_config, parts.loss_config))
    rows = [processor.example(source[row], np.random.default_rng(row), True) for row in range(len(source))]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    assert batch["labels"].tolist() == [0, 1, 2, 0, 1, 2] and batch["image"].shape == (6, 24, 24, 3)
    assert processor.tokenizer.decode(batch["tokens"][1][batch["mask"][1]].tolist()) == "a two on the left"
    params = random_params(parts.model, batch["image"], batch["tokens"], batch["mask"])
    extra = unbox(parts.family.init_extra(parts.model, params, jax.random.key(0), parts.loss_config))

    def step(params, extra, batch):
        return parts.family.loss(parts.model, params, extra, batch, jax.random.key(0), parts.loss_config)

    value, (metrics, _) = jax.eval_shape(step, params, extra, batch)
    assert value.shape == () and {"cross_entropy", "distillation", "accuracy"} <= set(metrics)
    specs = {name: {**spec, "batch_size": 8} for name, spec in settings.eval.items()}
    found = evaluation.run(evaluation.prepare(specs), parts.model, params, processor, output=tmp_path / "result.json")
    assert set(found) == {"dev/accuracy", "test/accuracy"}
    lines = [json.loads(line) for line in (tmp_path / "result.dev.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == [0, 1, 2, 0, 1, 2]
    right = [line["prediction"] == line["label"] for line in lines]
    assert found["dev/accuracy"] == pytest.approx(sum(right) / 6)


@pytest.mark.parametrize(
    "flag",
    ["configs/blip.py:base_retrieval_coco", "configs/blip.py:base_classification", "configs/blip.py:tiny,/nowhere"],
)
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
