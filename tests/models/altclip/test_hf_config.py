"""A foreign config.json becomes the architecture: precedence, questionable values, wrong ones, published sizes."""

import numpy as np
import pytest
import transformers

from vlm.convert.views import from_array
from vlm.encoders.bert import BertConfig
from vlm.encoders.vit import ViTConfig
from vlm.errors import UserError
from vlm.loading import expected_params
from vlm.models import get_family
from vlm.models.altclip.hf_config import architecture
from vlm.models.altclip.model import AltCLIPConfig

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 32, "max_position_embeddings": 20, "project_dim": 12}
VISION = {"hidden_size": 24, "num_hidden_layers": 11, "num_attention_heads": 2, "intermediate_size": 32}
VISION |= {"image_size": 16, "patch_size": 4}


def shapes(config):
    return expected_params(get_family("altclip"), config)


def views(config):
    return {path: from_array(np.zeros(leaf.shape)) for path, leaf in shapes(config).items()}


@pytest.fixture(scope="module")
def params():
    """Parameters whose shapes fit `small()`."""
    vision, text = ViTConfig(24, 11, 2, 32, 16, 4), BertConfig(40, 16, 2, 2, 32, 20)
    return views(AltCLIPConfig(vision=vision, text=text, project_dim=12, projection_dim=10))


def small(**changes):
    config = {"text_config": dict(TEXT), "vision_config": dict(VISION), "projection_dim": 10, "model_type": "altclip"}
    return config | changes


def test_config_dict_takes_precedence_with_class_defaults(params):
    text = TEXT | {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3}
    vision = VISION | {"hidden_act": "gelu"}
    for config in (
        small(text_config=text, text_config_dict=TEXT, vision_config=vision, vision_config_dict=VISION),
        small(text_config=text, vision_config=vision),
    ):
        notes = []
        ours = architecture(config, params, notes)
        theirs = transformers.AltCLIPConfig(**{k: v for k, v in config.items() if k != "model_type"})
        assert ours.text.dropout_rate == theirs.text_config.hidden_dropout_prob
        assert ours.text.attention_dropout_rate == theirs.text_config.attention_probs_dropout_prob
        assert ours.vision.activation == theirs.vision_config.hidden_act
        assert bool(notes) == ("text_config_dict" in config)


def test_m18_activation_is_questioned_and_can_be_overridden():
    sizes = {"hidden_size": 1280, "num_hidden_layers": 1, "num_attention_heads": 16, "intermediate_size": 5120}
    config = {
        **sizes,
        "patch_size": 14,
        "image_size": 28,
        "hidden_act": "quick_gelu",
        "model_type": "altclip_vision_model",
    }
    tower = ViTConfig(1280, 1, 16, 5120, 28, 14)
    tensors = views(AltCLIPConfig(vision=tower, text=None, projection_dim=None))
    notes = []
    assert architecture(config, tensors, notes).vision == tower
    assert "--override=vision.activation=gelu" in notes[0]
    changed = architecture(config, tensors, [], **{"vision.activation": "gelu"})
    assert changed.vision.activation == "gelu" and changed.vision.head_dim == 80
    with pytest.raises(UserError, match="model.vision.activtion does not exist; did you mean 'activation'"):
        architecture(config, tensors, [], **{"vision.activtion": "gelu"})
    with pytest.raises(UserError, match="no 'text' section"):
        architecture(config, tensors, [], **{"text.activation": "gelu"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": 3}, "vision_config: expected a mapping, found int"),
        ({"text_config_dict": []}, "text_config_dict: expected a mapping, found list"),
        ({"vision_config": VISION | {"hidden_act": "swish2"}}, "hidden_act: expected one of gelu"),
        ({"vision_config": VISION | {"image_size": [16, 32]}}, r"expected a square, found \[16, 32\]"),
        ({"vision_config": VISION | {"hidden_size": "24"}}, "vision.hidden_size: expected int, found '24'"),
        ({"vision_config": VISION | {"num_attention_heads": 7}}, "multiple of num_heads=7"),
    ],
)
def test_wrong_configs_end_in_one_line(params, change, message):
    with pytest.raises(UserError, match=message):
        architecture(small(**change), params, [])


@pytest.mark.parametrize(
    ("name", "counts"),
    [("altclip", (864_186_113, 559_630_080, 303_179_776)), ("m18", (1_193_017_857, 559_892_480, 630_766_080))],
)
def test_published_sizes(name, counts):
    """Parameter counts of the published configurations, whole and per tower, without allocating them."""
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    if name == "altclip":
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    width = 768 if name == "altclip" else 1024
    config = {
        "vision_config": vision | {"patch_size": 14},
        "text_config": {"project_dim": width},
        "projection_dim": width,
    }
    marks = {"vision/patch_embedding/kernel": (588, 1), "text/token_type_embedding/embedding": (1, 1)}
    marks |= {"vision_projection/kernel": (1, width), "text_projection/kernel": (width, width)}
    marks |= {"text_norm/scale": (1,), "text_transformation/kernel": (1, width)}
    found = shapes(architecture(config, {path: from_array(np.zeros(shape)) for path, shape in marks.items()}, []))
    sizes = {path: int(np.prod(leaf.shape)) for path, leaf in found.items()}
    text = ("text/", "text_norm/", "text_transformation/")
    assert sum(sizes.values()) == counts[0]
    assert sum(size for path, size in sizes.items() if path.startswith(text)) == counts[1]
    assert sum(size for path, size in sizes.items() if path.startswith("vision/")) == counts[2]
