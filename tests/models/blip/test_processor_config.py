"""Settings of the examples against the architecture and the objective of a run: what does not fit is named."""

import dataclasses

import pytest

from vlm.config import build, complete
from vlm.data.image import ImageSettings
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.experiment import make_processor
from vlm.fusion.med import MedConfig
from vlm.models.blip import FAMILY
from vlm.models.blip.config import BLIPConfig
from vlm.models.blip.loss import OBJECTIVES, LossConfig
from vlm.models.blip.processor_config import LIMITS, ProcessorConfig
from vlm.schema import Config

VIT = ViTConfig(8, 1, 2, 8, 24, 8)
STACK = MedConfig(40, 8, 1, 2, 8, 256, 8)
IDS = {"bos_id": 38, "enc_id": 39, "sep_id": 3, "cls_id": 2}
ALONE = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None}
MODELS = {
    "pretrain": {},
    "retrieval": {"shared_decoder": False},
    "caption": {**ALONE, "text": None, "decoder": STACK},
    "vqa": {**ALONE, "decoder": STACK},
    "nlvr": {**ALONE, "num_labels": 2, "num_images": 2},
    "classification": {**ALONE, "num_labels": 3},
    "dialog": {**ALONE, "itm": True},
}


def _check(kind, objective=None, model=(), **settings):
    config = BLIPConfig(vision=VIT, **({"text": STACK} | MODELS[kind] | IDS | dict(model)))
    image = {"image": ImageSettings(24, None, mode="exact")}
    processor = ProcessorConfig(**(image | {"task": kind} | settings))
    objective = objective or ("classification" if kind == "nlvr" else kind)
    processor.check(config, LossConfig(objective))


@pytest.mark.parametrize("task", LIMITS)
def test_what_fits_is_accepted(task):
    _check(task)


@pytest.mark.parametrize(("objective", "classes"), [("classification", 3), ("matching", 2)])
def test_labels_are_the_classes_of_what_learns_from_them(objective, classes):
    sections = {"model": MODELS["classification"] | {"itm": True}, "loss": {"objective": objective}}
    settings = build(Config, complete({"family": "blip", **sections, "processor": {"task": "classification"}}), "")
    assert make_processor(settings, FAMILY).config.num_labels == classes
    _check("classification", objective, {"itm": True}, num_labels=classes)
    message = f"config.processor.num_labels: expected the {classes} classes of objective '{objective}', found 4"
    with pytest.raises(UserError, match=message):
        _check("classification", objective, {"itm": True}, num_labels=4)


def test_every_objective_is_known():
    assert set(OBJECTIVES) == set(LIMITS) - {"nlvr"} | {"matching"}
    _check("classification", "matching", {"itm": True})


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("vqa", {"objective": "caption"}, "config.processor.task: objective 'caption' expects caption, found vqa"),
        ("dialog", {"objective": "matching"}, "objective 'matching' expects classification, found dialog"),
        ("retrieval", {"objective": "pretrain", "task": "pretrain"}, "'pretrain' needs config.model.shared_decoder"),
        ("retrieval", {"objective": "caption"}, "'caption' needs config.model.shared_decoder"),
        ("classification", {"objective": "matching"}, "'matching' needs config.model.itm"),
        ("classification", {"objective": "retrieval"}, "'retrieval' needs config.model.projection_dim"),
        ("caption", {"objective": "vqa", "task": "vqa"}, "'vqa' needs config.model.text"),
        ("classification", {"task": "nlvr"}, "config.model.num_images: task 'nlvr' expects 2, found 1"),
        ("nlvr", {"task": "classification"}, "config.model.num_images: task 'classification' expects 1, found 2"),
        ("vqa", {"image": ImageSettings(32, None, mode="exact")}, "expected the 24 x 24 of .*, found 32 x 32"),
        ("vqa", {"image": ImageSettings(None, None)}, "found pictures of any size"),
        ("vqa", {"max_length": 257}, "max_length: expected at most the 256 positions of config.model.text, found 257"),
        ("caption", {"max_length": 257}, "at most the 256 positions of config.model.decoder, found 257"),
        ("vqa", {"answer_length": 300}, "answer_length: expected at most the 256 positions of config.model.decoder"),
        ("dialog", {"caption_length": 300}, "caption_length: expected at most the 256 positions of config.model.text"),
        ("vqa", {"model": {"cls_id": 40}}, "config.model.cls_id: expected an id of the 40 tokens of .*, found 40"),
        ("vqa", {"model": {"sep_id": 102}}, "config.model.sep_id: .* found 102"),
        ("vqa", {"model": {"enc_id": 30523}}, "config.model.enc_id: .* of config.model.text, found 30523"),
        ("caption", {"model": {"bos_id": 30522}}, "config.model.bos_id: .* of config.model.decoder, found 30522"),
        ("pretrain", {"model": {"bos_id": 40}}, "config.model.bos_id: .* of config.model.text, found 40"),
    ],
)
def test_what_does_not_fit_is_named(task, changes, message):
    with pytest.raises(UserError, match=message):
        _check(task, **changes)


def test_a_dialog_needs_one_width():
    wide = dataclasses.replace(STACK, hidden_size=16)
    with pytest.raises(UserError, match="config.model.text.hidden_size: dialog expects the 8 of .*, found 16"):
        _check("dialog", model={"text": wide})
    _check("classification", model={"text": wide})
