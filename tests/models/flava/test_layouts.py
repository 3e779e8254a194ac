"""The layouts of torchmultimodal, of the original training code and of DALL-E give what transformers' file gives."""

import functools
import sys
import types

import jax
import numpy as np
import pytest
import torch

from vlm.convert.torch_file import open_tensors
from vlm.convert.views import from_array
from vlm.errors import UserError
from vlm.models.flava import weights
from vlm.models.flava.model import FLAVA
from vlm.tree import unflatten

from .published import (
    DALLE_NAMES,
    HEADS,
    MASK,
    MMF_NAMES,
    PIXELS,
    STATES,
    TMM_NAMES,
    TOKENS,
    TYPES,
    VARIANTS,
    chw,
    close,
    lazy,
    outputs,
    read,
    renamed,
    same,
    torchmultimodal,
)


def in_file(state, path, **options):
    torch.save(state, path, **options)
    return open_tensors(path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchmultimodal_pretraining(models, expected, variant, tmp_path):
    state = torchmultimodal(models["FlavaForPreTraining"], VARIANTS[variant])
    if variant == "first release":
        state["model.text_encoder.embeddings.position_ids"] = torch.arange(12)[None]
    imported = read(in_file(state, tmp_path / "flava.pt"), None, HEADS)
    assert imported.layout == "FLAVA (torchmultimodal)"
    same(imported.params, expected.params)
    config = imported.config
    assert not config.mask_text_padding and config.head_norm_eps == 1e-5 and config.vision.norm_eps == 1e-12
    assert config.text.num_heads == 2 and config.image_vocab_size == 20 and config.projection_dim == 10
    assert len(imported.notes) == 1 and "vision.num_heads=4" in imported.notes[0]
    back = HEADS | {"mask_text_padding": True, "head_norm_eps": None}
    assert read(lazy(state), None, back).config == expected.config


def test_torchmultimodal_computes_what_its_config_says(models):
    """The fusion attends to padding, and the heads have another epsilon, as in that code."""
    model = models["FlavaForPreTraining"]
    imported = read(lazy(torchmultimodal(model)), None, HEADS)
    ours = outputs(imported, "pair", "heads")
    with torch.no_grad():
        states = [
            model.flava.image_to_mm_projection(
                model.flava.image_model(chw(PIXELS), output_hidden_states=True).hidden_states[-1]
            ),
            model.flava.text_to_mm_projection(
                model.flava.text_model(
                    torch.tensor(TOKENS),
                    torch.tensor(MASK.astype(np.int64)),
                    torch.tensor(TYPES),
                    output_hidden_states=True,
                ).hidden_states[-1]
            ),
        ]
        close(ours["pair"].multimodal_embeddings, model.flava.multimodal_model(torch.cat(states, 1)).last_hidden_state)
        head = model.mim_head.transform
        hidden = head.transform_act_fn(head.dense(torch.tensor(STATES)))
        hidden = torch.nn.functional.layer_norm(hidden, (16,), head.LayerNorm.weight, head.LayerNorm.bias, 1e-5)
        close(ours["heads"][0], model.mim_head.decoder(hidden))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_torchmultimodal_model_without_losses(models, prefix):
    """FlavaModel's parameters, but for the temperature, which is a part of the loss there."""
    state = {f"flava.{name}": value for name, value in models["FlavaModel"].state_dict().items()}
    state = renamed(state, [*TMM_NAMES, (r"^model\.", prefix)])
    state.pop("loss.contrastive_loss.logit_scale")
    overrides = HEADS | {"vision.num_heads": 4}
    imported = read(lazy(state), None, overrides)
    theirs = read(lazy(models["FlavaModel"].state_dict()), models["FlavaModel"].config.to_dict())
    left = dict(imported.params)
    assert left.pop("logit_scale").read() == np.float32(2.6592) and "logit_scale" in imported.notes[-1]
    same(left, {path: view for path, view in theirs.params.items() if path != "logit_scale"})
    notes: list[str] = []
    tensors, config = weights.write(imported.config, imported.params, notes)
    assert config["architectures"] == ["FlavaModel"] and len(notes) == 1 and "padding" in notes[0]
    assert tensors.keys() == models["FlavaModel"].state_dict().keys()


def test_torchmultimodal_classification(models):
    generator = torch.Generator().manual_seed(0)
    weight = [torch.randn(size, generator=generator) for size in ((14, 16), (14,), (3, 14), (3,))]
    names = ("0.weight", "0.bias", "3.weight", "3.bias")
    model = models["FlavaForPreTraining"]
    state = {k: v for k, v in torchmultimodal(model).items() if k.startswith("model.")}
    state |= {f"classifier.model.{name}": value for name, value in zip(names, weight, strict=True)}
    imported = read(lazy(state), None, HEADS)
    classifier = imported.config.classifier
    assert (classifier.num_labels, classifier.hidden_size, classifier.input) == (3, 14, "multimodal")
    assert any("classifier.input=text" in note for note in imported.notes)
    imported = read(lazy(state), None, HEADS | {"classifier.input": "text"})
    params = unflatten({path: view.read() for path, view in imported.params.items()})
    classify = functools.partial(FLAVA(imported.config).apply, tokens=TOKENS, mask=MASK, method=FLAVA.classify)
    ours = jax.jit(classify)({"params": params})
    with torch.no_grad():
        hidden = model.flava.text_model(torch.tensor(TOKENS), torch.tensor(MASK.astype(np.int64))).last_hidden_state
        close(ours, torch.relu(hidden[:, 0] @ weight[0].T + weight[1]) @ weight[2].T + weight[3])
    without_dropout = renamed(state, [(r"classifier\.model\.3", "classifier.model.2")])
    same(read(lazy(without_dropout), None, HEADS | {"classifier.input": "text"}).params, imported.params)
    with pytest.raises(UserError, match=r"no FLAVA class with a classifier.*--drop='classifier/"):
        weights.write(imported.config, imported.params)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_original_training_checkpoint(models, expected, prefix, tmp_path):
    """In half precision, with embeddings stored twice, and without a codebook."""
    state = {k: v for k, v in models["FlavaForPreTraining"].state_dict().items() if "codebook" not in k}
    state = {name: value.half() for name, value in renamed(state, MMF_NAMES).items() if "decoder.bias" not in name}
    twice = {k.replace(".module", ""): v + 1 for k, v in state.items() if "encoder.module.embeddings" in k}
    assert any(name.startswith("image_encoder.embeddings.cls") for name in twice)
    state = {f"{prefix}{name}": value for name, value in (state | twice).items()}
    imported = read(in_file({"model": state, "epoch": 1}, tmp_path / "mmf.pt"), None, HEADS)
    assert imported.layout == "FLAVA (original training code)" and imported.config.codebook is None
    assert imported.config.head_norm_eps is None and "mask_text_padding=False" in imported.notes[-1]
    halved = {path: view.read().astype(np.float16).astype(np.float32) for path, view in expected.params.items()}
    halved = {path: from_array(value) for path, value in halved.items() if not path.startswith("codebook/")}
    same(imported.params, halved)
    tensors, config = weights.write(imported.config, imported.params)
    assert config["architectures"] == ["FlavaForPreTraining"] and not config["init_codebook"]
    assert not any("codebook" in name for name in tensors)


class Conv2d(torch.nn.Module):
    """A class that is not importable where its pickle is read."""


class Block(torch.nn.Module):
    """The same."""


def dalle_module(state):
    """DALL-E's encoder as its authors saved it, a whole module; attributes beside its parameters included."""

    def build(node):
        if not isinstance(node, dict):
            return torch.nn.Parameter(node)
        module = Conv2d() if "w" in node else Block()
        for name, part in node.items():
            setattr(module, name, build(part))
        module.device, module.n_layers, module.shape = torch.device("cpu"), 8, torch.Size([1, 2])
        return module

    return build(unflatten({name.replace(".", "/"): value for name, value in state.items()}))


FORMATS = {"zip": {}, "before 1.6": {"_use_new_zipfile_serialization": False}}


@pytest.fixture
def dalle_package(monkeypatch):
    """While it is there, the two classes are in a package that can be imported."""
    for cls in (Conv2d, Block):
        monkeypatch.setattr(cls, "__module__", "dall_e.encoder")
    package = types.ModuleType("dall_e.encoder")
    package.Conv2d, package.Block = Conv2d, Block
    for name in ("dall_e", "dall_e.encoder"):
        monkeypatch.setitem(sys.modules, name, package)
    yield
    for name in ("dall_e", "dall_e.encoder"):
        assert sys.modules[name] is None, "the package was imported"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_the_pickled_encoder_of_dalle(models, kind, tmp_path, dalle_package, monkeypatch):
    model = models["FlavaImageCodebook"]
    state = renamed(model.state_dict(), DALLE_NAMES)
    torch.save(dalle_module(state), tmp_path / "encoder.pkl", **FORMATS[kind])
    assert b"dall_e.encoder" in (tmp_path / "encoder.pkl").read_bytes()
    for name in ("dall_e", "dall_e.encoder"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it would now fail
    for path in (tmp_path, tmp_path / "encoder.pkl"):
        tensors = open_tensors(path)
        assert tensors.keys() == state.keys()
    imported = read(tensors)
    assert imported.layout == "DALL-E encoder" and imported.notes == []
    theirs = read(lazy(model.state_dict()), model.config.to_dict())
    assert imported.config == theirs.config
    same(imported.params, theirs.params)
    halved = {name: from_array(view.read().astype(np.float16)) for name, view in tensors.items()}
    assert {view.dtype for view in read(halved).params.values()} == {np.dtype(np.float32)}
