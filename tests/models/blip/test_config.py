"""BLIP's architectures: published sizes, contradictions."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import pytest

from vlm.fusion.med import MedConfig
from vlm.models.blip import example
from vlm.models.blip.config import VIT, BLIPConfig
from vlm.models.blip.model import BLIP
from vlm.tree import flatten

SMALL = dataclasses.replace(VIT, hidden_size=24, num_layers=2, num_heads=3, mlp_dim=36, image_size=16, patch_size=8)
STACK = MedConfig(60, 16, 2, 2, 28, 20, 24)
NONE = {"shared_decoder": False, "projection_dim": None, "itm": False, "temperature": None}


def _shapes(config):
    model = BLIP(config)
    return flatten(nn.unbox(jax.eval_shape(lambda: model.init(jax.random.key(0), **example(config)))["params"]))


def _published(size, large=False, **parts):
    vision = dataclasses.replace(VIT, image_size=size)
    if large:
        vision = dataclasses.replace(vision, hidden_size=1024, num_layers=24, num_heads=16, mlp_dim=4096)
    wide = MedConfig(context_size=vision.hidden_size)
    fill = {name: wide if value == "wide" else value for name, value in parts.items()}
    return BLIPConfig(vision, **{"text": wide, **fill})


CAPTIONER = {"text": None, "decoder": "wide", **NONE}
VQA = {"decoder": MedConfig(), **NONE}
ITM = {"shared_decoder": False, "temperature": None}
FEATURES = {"projection_dim": 512, "projection_bias": False, "itm": False, "temperature": None}
FEATURES |= {"shared_decoder": False, "logit_scale_init": 2.6592}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (_published(384, **CAPTIONER), 223_971_644),
        (_published(384, large=True, **CAPTIONER), 446_290_492),
        (_published(384, **VQA), 361_230_140),
        (_published(384, large=True, **VQA), 588_267_580 - 12 * 2 * 256 * 768),  # HF's decoder reads 1024 wide states
        (_published(384, **ITM), 223_744_258),
        (_published(384, large=True, **ITM), 446_128_642),
        (_published(384, **FEATURES | {"text": MedConfig(pooler=True)}), 224_726_017),
        (_published(384, True, **FEATURES | {"text": MedConfig(context_size=1024, pooler=True)}), 447_175_937),
    ],
)
def test_published_sizes(config, count):
    assert sum(math.prod(leaf.shape) for leaf in _shapes(config).values()) == count


def test_published_pretraining_size():
    shapes = _shapes(_published(224))
    count = lambda pattern: sum(math.prod(v.shape) for k, v in shapes.items() if re.fullmatch(pattern, k))  # noqa: E731
    assert count("(vision|text|lm_head)/.*") == 252_046_652
    assert count("vision/.*") == 85_798_656
    assert {k.split("/")[0] for k in shapes} - {"vision", "text", "lm_head"} == {
        "vision_projection",
        "text_projection",
        "itm_head",
        "temperature",
    }


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"text": None, "vision": None, **NONE}, r"model\.vision: expected an image encoder or a text stack"),
        ({"vision": None}, r"itm: expected an image encoder"),
        ({"decoder": STACK}, r"model\.shared_decoder: expected text and no decoder"),
        ({"text": None, "decoder": STACK, "shared_decoder": False}, "itm: expected a text encoder"),
        ({"logit_scale_init": 2.6}, "temperature: expected None beside logit_scale_init"),
        ({"projection_dim": None}, "expected None without projection_dim"),
        ({"num_images": 3}, "num_images: expected 1, or 2 with num_labels and without video, found 3"),
        ({"text": MedConfig()}, r"text\.context_size: expected vision\.hidden_size=24, found 768"),
        ({"decoder": STACK, **NONE}, r"decoder\.context_size: expected text\.hidden_size=16, found 24"),
    ],
)
def test_contradictions_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        BLIPConfig(**{"vision": SMALL, "text": STACK, **parts})
