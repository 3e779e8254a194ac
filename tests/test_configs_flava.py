"""FLAVA's shipped configurations: known settings only, models of the published sizes, schedules as published."""

import importlib
import math
import re

import jax
import numpy as np
import pytest

import train
from vlm.config import build, parse_config_flag
from vlm.errors import UserError
from vlm.evaluation import KINDS
from vlm.evaluation.runner import Feeding
from vlm.experiment import experiment
from vlm.models import get_family
from vlm.optimizer import learning_rate
from vlm.schema import Config
from vlm.sharding import unbox
from vlm.tree import flatten

flava = importlib.import_module("configs.flava")
PRETRAINING = ("tiny", "full", "no_init", "multimodal", "contrastive", "mim", "mlm")
FINE_TUNING = (*flava.TASKS, *(f"glue_{task}" for task in flava.GLUE), "probe")
VARIANTS = (*PRETRAINING, *flava.SIZES, *FINE_TUNING)


def settings_of(variant):
    return build(Config, parse_config_flag(f"configs/flava.py:{variant}"), "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_settings_are_known(variant):
    settings = settings_of(variant)
    family = get_family(settings.family)
    model = build(family.config_type, settings.model, "model")
    loss = build(family.loss_type, settings.loss, "loss")
    processor = build(family.processor_type, settings.processor, "processor")
    assert processor.task == loss.objective
    if model.vision is not None:
        assert processor.patch_size == model.vision.patch_size
        assert processor.image.output_size == ((480, 480) if variant == "vqa" else (model.vision.image_size,) * 2)
    if model.codebook is not None:
        assert processor.codebook_size == model.codebook_size and processor.mask_patches == loss.max_masked_patches
    if model.text is not None:
        assert max(processor.max_length, processor.text_length) <= model.text.max_length
    if loss.objective == "soft_labels":
        assert processor.num_answers == model.classifier.num_labels
    if loss.objective == "classification":
        assert processor.num_labels == model.classifier.num_labels
    for name, spec in settings.eval.items():
        kind, common = KINDS[spec["kind"]][0], vars(Feeding())
        build(kind, {key: value for key, value in spec.items() if key not in ("kind", *common)}, name)
    assert float(learning_rate(settings.optimizer, settings.train.steps)(settings.train.steps // 2)) > 0


@pytest.mark.parametrize(
    "variant", ["tiny", "multimodal", "contrastive", "mim", "mlm", "10b", "vqa", "glue_stsb", "probe"]
)
def test_what_the_objective_does_not_reach_is_frozen(variant):
    """Exactly that, but for the probe, whose encoder is frozen too; the rest is trained."""
    parts = experiment(settings_of(variant))
    frozen = {path for path, group in parts.optimizer.groups.items() if group.freeze}
    if variant == "vqa":  # fusion reads what is before these norms
        assert not any(
            decays for path, decays in parts.optimizer.decay.items() if re.match("(text|vision)/output_norm/", path)
        )
    expected = {path for path in parts.optimizer.groups if re.fullmatch(parts.loss_config.locked, path)}
    if variant == "probe":
        expected |= {path for path in parts.optimizer.groups if path.startswith("vision/")}
    assert frozen == expected and len(frozen) < len(parts.optimizer.groups)


PARAMETERS = {
    "full": 357_645_303,  # as of Hugging Face's FlavaForPreTraining
    "mlm": 109_483_776 + 24_063_546,
    "mim": 86_390_016 + 6_891_776 + 53_786_240,
    "hateful_memes": 86_390_016 + 109_483_776 + 43_120_128 + 2 * 590_592 + 769 * 1536 + 1537 * 2,
    "glue_stsb": 109_483_776 + 769 * 768 + 769,
}


@pytest.mark.parametrize("variant", PARAMETERS)
def test_published_sizes(variant):
    parts = experiment(settings_of(variant))
    params = flatten(unbox(jax.eval_shape(lambda: parts.init.init_params(jax.random.key(0)))))
    assert sum(math.prod(leaf.shape) for leaf in params.values()) == PARAMETERS[variant]


def test_pretraining_draws_pairs_150_000_times():
    settings = settings_of("full")
    shares = settings.data.streams
    assert shares == {"pairs": 0.7, "images": 0.15, "text": 0.15}
    assert round(settings.train.steps * shares["pairs"]) == 150_000 and settings.data.batch_size == 8192
    kinds = {source["stream"]: set(source["fields"]) for source in settings.data.sources}
    assert kinds == {"pairs": {"image", "text"}, "images": {"image"}, "text": {"text"}}
    weights = {source["path"]: source["weight"] for source in settings.data.sources if source["stream"] == "text"}
    assert weights == {"data/ccnews/*.parquet": 76.0, "data/bookcorpus/*.parquet": 5.0}
    rate = learning_rate(settings.optimizer, settings.train.steps)
    found = [rate(step) for step in (0, 5000, 10_000, settings.train.steps)]
    np.testing.assert_allclose(found, [0, 5e-4, 1e-3, 0], atol=1e-9)
    assert settings.train.keep_every == settings.train.eval_every == 8000  # the best of these is the paper's model
    rule = settings.optimizer
    assert (rule.weight_decay, rule.betas, rule.grad_clip_norm) == (0.1, (0.9, 0.999), None)


def test_fine_tuning_follows_the_published_schedules():
    rate = learning_rate(settings_of("glue_qnli").optimizer, 33_112)
    np.testing.assert_allclose([rate(s) for s in (993, 1986, 17_549, 33_112)], [5e-6, 1e-5, 5e-6, 0], atol=1e-9)
    rate = learning_rate(settings_of("vqa").optimizer, 44_000)
    np.testing.assert_allclose([rate(s) for s in (1000, 2000, 23_000, 44_000)], [5e-5, 1e-4, 5e-5, 0], atol=1e-9)


def test_another_number_of_classes_than_the_classifier_has_is_refused():
    config = parse_config_flag("configs/flava.py:glue_mnli", ["--config.model.classifier.num_labels=4"])
    with pytest.raises(UserError, match="processor.num_labels: expected the 4 of config.model.classifier, found 3"):
        experiment(build(Config, config, ""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "loss.max_masked_patches=70",
            "at least 75, as many as config.processor.mask_patches allows to hide, found 70",
        ),
        ("processor.mask_patches=80", "at least 80, as many as config.processor.mask_patches allows to hide, found 75"),
        (
            "processor.max_length=100",
            "at least 15, as many as config.processor.mlm_probability allows to hide, found 12",
        ),
        ("processor.max_masked_tokens=None", "at least 510, as many as .*max_masked_tokens allows to hide, found 128"),
    ],
)
def test_all_that_is_hidden_must_be_predicted(change, message):
    config = parse_config_flag("configs/flava.py:full", [f"--config.{change}"])
    with pytest.raises(UserError, match=rf"config.loss.max_masked_\w+: expected {message}"):
        experiment(build(Config, config, ""))


def test_fine_tuning_skips_padding():
    for variant in (*flava.TASKS, *(f"glue_{task}" for task in flava.GLUE)):
        settings = settings_of(variant)
        texts = settings.processor["text_length"] if variant.startswith("glue") else 77
        lengths = settings.train.text_lengths
        assert lengths and list(lengths) == sorted(lengths) and 2 * lengths[0] < texts and lengths[-1] < texts
        assert lengths == ((64, 128, 256) if texts == 512 else (32, 48))


def test_dry_runs_show_what_every_stream_gives(capsys):
    assert train.main(["--config=configs/flava.py:tiny,/nowhere", "--dry_run"]) == 0
    images, pairs, text = (part.split() for part in capsys.readouterr().out.split("== one batch of ")[1:])
    assert images[0] == "images," and {"codebook_image", "patch_mask", "32x36"} <= set(images)
    assert pairs[0] == "pairs," and {"image", "itm_labels", "masked_tokens", "32x20"} <= set(pairs)
    assert text[0] == "text," and {"token_labels", "masked_tokens"} <= set(text) and "image" not in text


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match="unknown variant 'glue_wnli'; choose from tiny, full, no_init"):
        flava.get_config("glue_wnli")
