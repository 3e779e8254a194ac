"""Every published layout gives the parameters that make our model equal the original, and is written back as it was."""

import dataclasses
import functools
import json
import re
import sys
import types

import jax
import numpy as np
import pytest
import torch
import transformers

from vlm.convert.torch_file import open_tensors
from vlm.convert.views import TensorView, from_array
from vlm.convert.writer import write_tensors
from vlm.errors import UserError
from vlm.models import FAMILIES, get_family
from vlm.models.flava import weights
from vlm.models.flava.hf_config import architecture
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
            "pair": lambda: model(**image, **text),
            "masked": lambda: model(**image, **text, **masked, fuse=False),
            "heads": lambda: [model(head, STATES, method=FLAVA.predict_masked) for head in HEAD_NAMES],
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
    ours = outputs(imported, "masked", "codebook", "heads")
    close(ours["codebook"].transpose(0, 3, 1, 2), model.image_codebook(chw(CODEBOOK_PIXELS)))
    both = model(**image, **text, **masked, return_loss=False)
    names = ("image_embeddings", "text_embeddings", "multimodal_masked_embeddings")
    logits = ("itm_logits", "mmm_image_logits", "mmm_text_logits", "contrastive_logits_per_image")
    for name in (*names, *logits):
        close(getattr(ours["masked"], name), getattr(both, name))
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


# The other layouts' names, written here from their published lists, independently of the tables.
TMM_NAMES = [
    (r"^flava\.image_model\.", "model.image_encoder."),
    (r"^flava\.text_model\.", "model.text_encoder."),
    (r"^flava\.multimodal_model\.", "model.mm_encoder."),
    (r"^flava\.logit_scale", "loss.contrastive_loss.logit_scale"),
    (r"^flava\.", "model."),
    (r"embeddings\.LayerNorm", "embeddings.layer_norm"),
    (r"attention\.attention\.", "attention."),
    (r"attention\.output\.dense", "attention.output"),
    (r"intermediate\.dense", "feedforward.model.0"),
    (r"(layer\.\d+\.)output\.dense", r"\1feedforward.model.2"),
    (r"layernorm_before", "attention_layernorm"),
    (r"layernorm_after", "feedforward_layernorm"),
    (r"^(mim|mlm)_head\.", r"loss.\1_loss.cls."),
    (r"^mmm_image_head\.", "loss.mmm_loss.mim.cls."),
    (r"^mmm_text_head\.", "loss.mmm_loss.mlm.cls."),
    (r"^itm_head\.pooler", "loss.itm_loss.pooler"),
    (r"^itm_head\.seq", "loss.itm_loss.cls.seq"),
    (r"cls\.transform\.dense", "cls.dense"),
    (r"cls\.transform\.LayerNorm", "cls.layer_norm"),
    (r"^image_codebook\.blocks", "image_codebook.encoder.blocks"),
]
DALLE_NAMES = [(r"(group_\d)\.group", r"\1"), ("res_path.path", "res_path"), (r"\.weight$", ".w"), (r"\.bias$", ".b")]
OLD_NAMES = [  # before August 2022
    (r"feedforward\.model\.0", "intermediate"),
    (r"feedforward\.model\.2", "output"),
    (r"attention_layernorm", "layernorm_before"),
    (r"feedforward_layernorm", "layernorm_after"),
    (r"embeddings\.layer_norm", "embeddings.LayerNorm"),
]
OLDEST_NAMES = [  # before July 2022
    *OLD_NAMES,
    (r"attention\.(query|key|value)", r"attention.attention.\1"),
    (r"model\.(image|text)_projection", r"loss.contrastive_loss.\1_projection"),
]
MMF_NAMES = [
    (r"^flava\.multimodal_model\.cls_token", "mm_encoder.module.encoder.cls_token"),
    (r"^flava\.multimodal_model\.", "mm_encoder.module."),
    (r"^flava\.(image|text)_model\.", r"\1_encoder.module."),
    (r"^flava\.(image|text)_to_mm_projection", r"mm_\1_projection"),
    (r"^flava\.logit_scale", "heads.cmd.clip_head.logit_scale"),
    (r"^flava\.", ""),
    (r"^mmm_image_head\.", "heads.cmd.mim_head.cls.predictions."),
    (r"^mmm_text_head\.", "heads.cmd.mlm_head.cls.predictions."),
    (r"^mlm_head\.", "heads.fairseq_mlm.cls.predictions."),
    (r"^mim_head\.", "heads.imagenet.mim_head.cls.predictions."),
    (r"^itm_head\.pooler", "heads.cmd.itm_head.pooler"),
    (r"^itm_head\.seq", "heads.cmd.itm_head.cls.seq"),
]


def renamed(state, names):
    found = {}
    for old, value in state.items():
        new = functools.reduce(lambda name, pair: re.sub(pair[0], pair[1], name), names, old)
        assert new not in found, (old, new)
        found[new] = value
    return found


def torchmultimodal(model, extra=()):
    """A pretraining file: DALL-E's own names in the codebook."""
    state = renamed(model.state_dict(), TMM_NAMES)
    codebook = {name: value for name, value in state.items() if name.startswith("image_codebook.")}
    rest = {name: value for name, value in state.items() if name not in codebook}
    return renamed(rest | renamed(codebook, DALLE_NAMES), extra)


@pytest.fixture(scope="module")
def expected(models):
    """What Hugging Face's file of the pretraining model gives."""
    return read(lazy(models["FlavaForPreTraining"].state_dict()), full_config().to_dict())


def in_file(state, path, **options):
    torch.save(state, path, **options)
    return open_tensors(path)


VARIANTS = {
    "unified": [],
    "with dropout": [(r"feedforward\.model\.2", "feedforward.model.3")],
    "before the unified layers": OLD_NAMES,
    "first release": OLDEST_NAMES,
    "Lightning": [(r"^", "model.")],
}


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


def test_parts_of_a_larger_file_under_any_prefix(models):
    """Only one encoder's tensors, as in the whole model's file or in the joint model's."""
    for name, part, path in (("text", "FlavaTextModel", "text/"), ("multimodal", "FlavaMultimodalModel", "fusion/")):
        state, config = models[part].state_dict(), models[part].config.to_dict()
        alone = read(lazy(state), config)
        assert all(key.startswith(path) for key in alone.params)
        for prefix in (f"flava.{name}_model.", f"{name}_model."):
            prefixed = {f"{prefix}{key}": value for key, value in lazy(state).items()}
            imported = read(prefixed, config)
            assert imported.config == alone.config
            same(imported.params, alone.params)
            joint = {"model_type": "flava", f"{name}_config": config}
            assert read(prefixed, joint).config == alone.config
    state = models["FlavaImageCodebook"].state_dict()
    prefixed = {f"image_codebook.{key}": value for key, value in lazy(state).items()}
    config = {"model_type": "flava", "image_codebook_config": models["FlavaImageCodebook"].config.to_dict()}
    same(read(prefixed, config).params, read(lazy(state)).params)


def test_no_other_family_takes_a_file_without_a_configuration(models):
    others = [layout for name in FAMILIES if name != "flava" for layout in get_family(name).weights.LAYOUTS]
    whole = models["FlavaForPreTraining"].state_dict()
    states = [model.state_dict() for name, model in models.items() if name != "FlavaImageModel"]
    states += [{k.removeprefix("flava.image_model."): v for k, v in whole.items() if ".image_model." in k}]
    states += [torchmultimodal(models["FlavaForPreTraining"], extra) for extra in VARIANTS.values()]
    states += [renamed(whole, MMF_NAMES)]
    for state in states:
        assert [layout.name for layout in others if layout.fits(state)] == []


def test_old_files_with_buffers(models, expected, tmp_path):
    """pytorch_model.bin of 2022: both names of every tied bias, and position numbers."""
    state = models["FlavaForPreTraining"].state_dict()
    state["flava.text_model.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    imported = read(open_tensors(tmp_path), full_config().to_dict())
    assert imported.config == expected.config
    same(imported.params, expected.params)


@pytest.mark.parametrize("kept", ["bias", "decoder.bias", "both"])
def test_a_heads_bias_under_either_name(models, expected, kept):
    state = lazy(models["FlavaForPreTraining"].state_dict())
    for head in HEAD_NAMES:
        for name in {"bias", "decoder.bias"} - {kept} if kept != "both" else ():
            del state[f"{head}_head.{name}"]
    same(read(state, full_config().to_dict()).params, expected.params)
    if kept == "both":
        state["mlm_head.bias"] = from_array(np.zeros(40, np.float32))
        with pytest.raises(UserError, match=r"1 problems: mlm_head\.bias differs from mlm_head\.decoder\.bias$"):
            read(state, full_config().to_dict())
        del state["mlm_head.bias"], state["mlm_head.decoder.bias"]
        with pytest.raises(UserError, match=r"1 problems: missing mlm_head/bias"):
            read(state, full_config().to_dict())


LEGACY = {
    "absent": {},
    "null": {"text_config_dict": None},
    "empty": {"text_config_dict": {}, "image_config_dict": {}},
    "partial": {"text_config_dict": {"layer_norm_eps": 1e-6, **ENCODER, "unknown": 3}},
    "codebook": {
        "image_codebook_config_dict": {"vocab_size": 20},
        "multimodal_config_dict": ENCODER | {"num_hidden_layers": 1},
    },
}


@pytest.mark.parametrize("case", LEGACY)
def test_old_configurations_are_merged_as_in_transformers(expected, case):
    config = full_config().to_dict()
    config["text_config"] |= {"layer_norm_eps": 1e-7, "hidden_dropout_prob": 0.5}
    config |= LEGACY[case]
    theirs = transformers.FlavaConfig(**json.loads(json.dumps(config)))
    views = {path: view for path, view in expected.params.items() if not path.startswith("codebook/")}
    notes: list[str] = []
    ours = architecture(config, views, notes, layout="FLAVA (Hugging Face)", overrides={})
    for part, section in (("text", "text_config"), ("vision", "image_config"), ("fusion", "multimodal_config")):
        mine, other = getattr(ours, part), getattr(theirs, section)
        assert (mine.hidden_size, mine.num_layers, mine.num_heads, mine.norm_eps, mine.dropout_rate) == (
            *(other.hidden_size, other.num_hidden_layers, other.num_attention_heads),
            *(other.layer_norm_eps, other.hidden_dropout_prob),
        )
    assert ours.image_vocab_size == theirs.image_config.vocab_size
    warned = "\n".join(notes)
    assert all(note.startswith("warning: config.json: as in transformers, ") for note in notes)
    if case in ("absent", "null"):
        assert not notes
    elif case == "empty":
        assert len(notes) == 2 and "text_config_dict overrides text_config: hidden_size 16 -> 768" in warned
        assert "hidden_dropout_prob 0.5 -> 0.0" in warned and "image_size 8 -> 224" in warned
    elif case == "partial":
        assert len(notes) == 1 and "layer_norm_eps 1e-07 -> 1e-06" in warned and "hidden_size" not in warned
    else:
        assert len(notes) == 1 and "multimodal_config_dict overrides multimodal_config: num_hidden_layers" in warned


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({}, r"35 problems: .*expected shape \[30522\], found \[40\]"),
        ({"hidden_size": 16}, r"text\.hidden_size: expected a multiple of num_heads=12, found 16"),
    ],
)
def test_sizes_that_do_not_fit_name_the_old_configuration(models, section, problem):
    config = full_config().to_dict() | {"text_config_dict": section}
    with pytest.raises(UserError, match=rf"{problem}.*; warning: .*num_attention_heads 2 -> 12") as error:
        read(lazy(models["FlavaForPreTraining"].state_dict()), config)
    assert "\n" not in str(error.value)


def stub(shape):
    return TensorView(shape, np.dtype(np.float32), lambda index: np.zeros(0))


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (128, 2), (1280, 16), (1408, 16), (2048, 16), (80, None)])
def test_heads_of_a_file_without_a_configuration(width, heads):
    views = {"fusion/layers/mlp/up/kernel": stub((6, width, 4 * width)), "fusion/pooler/kernel": stub((width, width))}
    notes: list[str] = []
    if heads is None:
        with pytest.raises(UserError, match=r"^fusion: nothing tells .* width 80.*--override=fusion\.num_heads=N$"):
            architecture(None, views, notes, layout="FLAVA (torchmultimodal)", overrides={})
        return
    built = architecture(None, views, notes, layout="FLAVA (torchmultimodal)", overrides={})
    assert built.fusion.num_heads == heads and f"fusion.num_heads={heads}" in notes[0]


def test_all_problems_are_in_one_line(models):
    state = lazy(models["FlavaForPreTraining"].state_dict())
    broken = {name: view for name, view in state.items() if name != "flava.text_projection.bias"}
    broken |= {"surprise": stub((1,)), "itm_head.seq_relationship.weight": stub((3, 16))}
    del broken["image_codebook.blocks.group_2.group.block_1.id_path.bias"]
    del broken["flava.multimodal_model.encoder.layer.0.layernorm_after.bias"]
    with pytest.raises(UserError) as error:
        read(broken, full_config().to_dict())
    message = str(error.value)
    for part in (
        "unknown tensor surprise",
        "missing text_projection/bias (from (flava.|)text_projection.bias)",
        "itm_head/out/kernel: expected shape [16, 2], found [16, 3]",
        "missing codebook/group_2/block_1/identity/bias",
        "multimodal_model.encoder.layer.0.layernorm_after.bias",
    ):
        assert part in message, message
    assert "\n" not in message
    del broken["flava.text_model.embeddings.word_embeddings.weight"]
    with pytest.raises(UserError, match=r"unknown tensor surprise.*missing text/token_embedding/embedding"):
        read(broken, full_config().to_dict())
    with pytest.raises(UserError, match="surprise|text/token_embedding/embedding"):
        read(broken)


def test_nothing_is_read_but_the_biases_with_two_names(models):
    seen = set()

    def counted(name, view):
        return TensorView(view.shape, view.dtype, lambda index: seen.add(name) or view.fetch(index))

    tensors = {name: counted(name, view) for name, view in lazy(models["FlavaForPreTraining"].state_dict()).items()}
    imported = read(tensors, full_config().to_dict())
    assert seen == {f"{head}_head.{end}" for head in HEAD_NAMES for end in ("bias", "decoder.bias")}
    seen.clear()
    weights.write(imported.config, imported.params)
    assert not seen


def test_what_transformers_cannot_hold(expected):
    config = expected.config
    for changes, message in (
        ({"heads": False}, r"codebook, but no heads.*--drop='codebook/"),
        ({"fusion": None, "heads": False, "codebook": None}, r"--drop='\(\?!text/\)"),
        ({"vision": dataclasses.replace(config.vision, pooler=False)}, "needs a pooler in every encoder: vision"),
        ({"codebook": dataclasses.replace(config.codebook, num_groups=3)}, "4 groups, found 3"),
        (
            {"fusion": dataclasses.replace(config.fusion, hidden_size=8)},
            "one width, found vision 16, text 16, fusion 8",
        ),
    ):
        with pytest.raises(UserError, match=message):
            weights.write(dataclasses.replace(config, **changes), expected.params)
    kept = {path: view for path, view in expected.params.items() if path.startswith("text/")}
    alone = weights.without(config, kept)
    tensors, written = weights.write(alone, kept)
    assert written["model_type"] == "flava_text_model" and "embeddings.word_embeddings.weight" in tensors
    kept = {path: view for path, view in expected.params.items() if "_head" not in path and "codebook" not in path}
    assert weights.write(weights.without(config, kept), kept)[1]["architectures"] == ["FlavaModel"]


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
