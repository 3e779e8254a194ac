"""Every published layout gives the parameters that make our model equal the original, and is written back as it was."""

import functools
import json
import re

import jax
import numpy as np
import pytest
import torch
import transformers

from vlm.convert.torch_file import open_tensors
from vlm.convert.views import TensorView, from_array
from vlm.convert.writer import write_tensors
from vlm.errors import UserError
from vlm.models.flava import weights
from vlm.models.flava.model import FLAVA
from vlm.sharding import unbox
from vlm.tree import flatten, unflatten

ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = ENCODER | {"vocab_size": 40, "max_position_embeddings": 12}
IMAGE = ENCODER | {"num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 8, "patch_size": 4, "vocab_size": 20}
CODEBOOK = {"hidden_size": 4, "vocab_size": 20}
SETTINGS = ("hidden_act", "layer_norm_eps", "qkv_bias", "mask_token", "use_cls_token", "num_groups", "pad_token_id")
HEADS = {"vision.num_heads": 4, "text.num_heads": 2, "fusion.num_heads": 2}
HEAD_NAMES = ("mim", "mlm", "mmm_image", "mmm_text")
CLASSES = {
    "FlavaForPreTraining": "FLAVA (Hugging Face)",
    "FlavaModel": "FLAVA (Hugging Face)",
    "FlavaTextModel": "FLAVA text (Hugging Face)",
    "FlavaImageModel": "FLAVA image (Hugging Face)",
    "FlavaMultimodalModel": "FLAVA multimodal (Hugging Face)",
    "FlavaImageCodebook": "FLAVA codebook (Hugging Face)",
}

RNG = np.random.default_rng(0)
PIXELS = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
CODEBOOK_PIXELS = RNG.uniform(0.1, 0.9, (2, 16, 16, 3)).astype(np.float32)
STATES = RNG.normal(size=(2, 5, 16)).astype(np.float32)
TOKENS = np.array([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]])
MASKED_TOKENS = np.array([[1, 5, 3, 7, 2], [1, 3, 2, 0, 0]])
TYPES = np.array([[0, 0, 1, 1, 1], [0, 1, 1, 0, 0]])
PATCHES = np.array([[True, False, False, True], [False, False, True, False]])
MASK = TOKENS != 0


def full_config(**changes):
    sections = {"image_config": IMAGE, "text_config": TEXT, "multimodal_config": ENCODER}
    sections["image_codebook_config"] = CODEBOOK
    config = transformers.FlavaConfig(**(sections | changes), hidden_size=16, projection_dim=10)
    config._attn_implementation = "eager"
    return config


@pytest.fixture(scope="module")
def models(randomise):
    """A small random model of every class; the joint one without heads has three different widths."""
    odd = {"image_config": IMAGE | {"hidden_size": 24}, "multimodal_config": ENCODER | {"hidden_size": 12}}
    configs = {
        "FlavaForPreTraining": full_config(),
        "FlavaModel": full_config(**odd),
        "FlavaTextModel": transformers.FlavaTextConfig(**TEXT),
        "FlavaImageModel": transformers.FlavaImageConfig(**IMAGE, qkv_bias=False, mask_token=False),
        "FlavaMultimodalModel": transformers.FlavaMultimodalConfig(**ENCODER),
        "FlavaImageCodebook": transformers.FlavaImageCodebookConfig(**CODEBOOK),
    }
    return {name: randomise(getattr(transformers, name)(configs[name]), scale=0.2) for name in CLASSES}


@functools.cache
def shapes(config):
    return flatten(unbox(jax.eval_shape(lambda: FLAVA(config).init(jax.random.key(0)))["params"]))


def lazy(state):
    return {name: from_array(np.asarray(value.detach())) for name, value in state.items()}


def read(tensors, config=None, overrides=None):
    return weights.read(tensors, config, source="file", shapes=shapes, overrides=overrides)


def opened(folder):
    return read(open_tensors(folder), json.loads((folder / "config.json").read_text()))


def same(left, right):
    assert left.keys() == right.keys()
    for name, view in left.items():
        assert view.dtype == right[name].dtype and view.shape == right[name].shape, name
        assert view.read().tobytes() == right[name].read().tobytes(), name


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), atol=2e-5, rtol=0)


@functools.cache
def compiled(config, names):
    """Everything that a model of these parts says, in one program."""

    image, text = {"image": PIXELS}, {"tokens": TOKENS, "mask": MASK, "token_types": TYPES}
    masked = {"patch_mask": PATCHES, "masked_tokens": MASKED_TOKENS}

    def run(params):
        model = functools.partial(FLAVA(config).apply, {"params": params})
        calls = {
            "codebook": lambda: model(CODEBOOK_PIXELS, method=FLAVA.codebook_logits),
            "image": lambda: model(**image),
            "text": lambda: model(**text),
            "pair": lambda: model(**image, **text, **(masked if config.heads else {})),
            "heads": lambda: [model(STATES, method=lambda module, x: module.predict_masked(h, x)) for h in HEAD_NAMES],
            "fusion": lambda: model(STATES, MASK, method=lambda module, *x: module.fusion(*x)),
        }
        return {name: calls[name]() for name in names}

    return jax.jit(run)


def outputs(imported, *names):
    return compiled(imported.config, names)(unflatten({path: v.read() for path, v in imported.params.items()}))


def chw(image):
    return torch.tensor(image.transpose(0, 3, 1, 2))


def assert_equal_outputs(imported, model):
    name = type(model).__name__
    image = {"pixel_values": chw(PIXELS)}
    text = {"input_ids": torch.tensor(TOKENS), "attention_mask": torch.tensor(MASK.astype(np.int64))}
    text["token_type_ids"] = torch.tensor(TYPES)
    masked = {"bool_masked_pos": torch.tensor(PATCHES), "input_ids_masked": torch.tensor(MASKED_TOKENS)}
    with torch.no_grad():
        if name == "FlavaImageCodebook":
            close(outputs(imported, "codebook")["codebook"].transpose(0, 3, 1, 2), model(chw(CODEBOOK_PIXELS)))
        elif name == "FlavaTextModel":
            assert_state(outputs(imported, "text")["text"].text_output, model(**text))
        elif name == "FlavaImageModel":
            assert_state(outputs(imported, "image")["image"].image_output, model(**image))
        elif name == "FlavaMultimodalModel":
            whole = torch.tensor(np.pad(MASK, ((0, 0), (1, 0)), constant_values=True).astype(np.int64))
            assert_state(outputs(imported, "fusion")["fusion"], model(torch.tensor(STATES), attention_mask=whole))
        elif name == "FlavaModel":
            ours, theirs = outputs(imported, "pair")["pair"], model(**image, **text, output_hidden_states=True)
            for part in ("image", "text", "multimodal"):
                assert_state(getattr(ours, f"{part}_output"), getattr(theirs, f"{part}_output"))
            close(imported.params["logit_scale"].read(), model.logit_scale)
        else:
            assert_pretraining(imported, model, image, text, masked)


def assert_state(ours, theirs):
    close(ours.last_hidden_state, theirs.last_hidden_state)
    close(ours.pooler_output, theirs.pooler_output)


def assert_pretraining(imported, model, image, text, masked):
    ours = outputs(imported, "pair", "codebook", "heads")
    close(ours["codebook"].transpose(0, 3, 1, 2), model.image_codebook(chw(CODEBOOK_PIXELS)))
    both = model(**image, **text, **masked, return_loss=False, skip_unmasked_multimodal_encoder=False)
    names = ("image_embeddings", "text_embeddings", "multimodal_embeddings", "multimodal_masked_embeddings")
    logits = ("itm_logits", "mmm_image_logits", "mmm_text_logits", "contrastive_logits_per_image")
    for name in (*names, *logits):
        close(getattr(ours["pair"], name), getattr(both, name))
    for head, logits in zip(HEAD_NAMES, ours["heads"], strict=True):
        close(logits, getattr(model, f"{head}_head")(torch.tensor(STATES)))


def section_values(config):
    """The settings that our export writes down, of the model or of each of its parts."""
    sections = [getattr(config, f"{part}_config", None) for part in ("text", "image", "multimodal")]
    sections = [section for section in sections if section is not None] or [config]
    return [{key: getattr(section, key, None) for key in (*IMAGE, *TEXT, *SETTINGS)} for section in sections]


@pytest.mark.parametrize("name", CLASSES)
def test_transformers_to_ours_and_back(models, name, tmp_path):
    models[name].save_pretrained(tmp_path / "source")
    imported = opened(tmp_path / "source")
    assert imported.notes == [] and imported.layout == CLASSES[name]
    assert_equal_outputs(imported, models[name])
    notes: list[str] = []
    tensors, config = weights.write(imported.config, imported.params, notes)
    assert notes == [] and config["architectures"] == [name]
    (tmp_path / "target").mkdir()
    write_tensors(tmp_path / "target", "model", tensors, metadata={"format": "pt"})
    (tmp_path / "target" / "config.json").write_text(json.dumps(config))
    loaded, info = type(models[name]).from_pretrained(tmp_path / "target", output_loading_info=True)
    assert not any(info.values()), info
    for (key, ours), (_, theirs) in zip(loaded.state_dict().items(), models[name].state_dict().items(), strict=True):
        assert torch.equal(ours, theirs), key
    assert section_values(loaded.config) == section_values(models[name].config)
    again = opened(tmp_path / "target")
    assert again.config == imported.config
    same(again.params, imported.params)
    same(open_tensors(tmp_path / "target"), open_tensors(tmp_path / "source"))
