"""Every class of transformers gives the parameters that make our model equal it, and is written back as it was."""

import json

import numpy as np
import pytest
import torch

from vlm.convert.torch_file import open_tensors
from vlm.convert.views import TensorView, from_array
from vlm.convert.writer import write_tensors
from vlm.errors import UserError
from vlm.models import FAMILIES, get_family
from vlm.models.flava import weights

from .published import (
    CLASSES,
    CODEBOOK_PIXELS,
    HEAD_NAMES,
    IMAGE,
    MASK,
    MASKED_TOKENS,
    MMF_NAMES,
    PATCHES,
    PIXELS,
    SETTINGS,
    STATES,
    TEXT,
    TOKENS,
    TYPES,
    VARIANTS,
    chw,
    close,
    full_config,
    lazy,
    outputs,
    read,
    renamed,
    same,
    stub,
    torchmultimodal,
)


def opened(folder):
    return read(open_tensors(folder), json.loads((folder / "config.json").read_text()))


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
